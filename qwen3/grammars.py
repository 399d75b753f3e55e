"""Grammars that a text must follow: JSON, the JSON of a schema, tool calls. They are compiled and matched by the library llguidance.

    grammar = Grammars(tokenizer, cfg.vocab_size).json(schema)
    matcher = grammar.start()              # of one text
    matcher.allowed(V)                     # bool [V], the tokens that may come next
    matcher.take(token)

Schemas come from outside: each is compiled in a thread of its own, and refused after LIMIT_S seconds. The library has limits for the size
of a grammar and for the work of a step.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import threading

import numpy as np

from qwen3.schema import short
from qwen3.steering import GuideError
from qwen3.tool_calls import CLOSE, OPEN

LIMIT_S, COMPILERS = 10.0, 2  # seconds for one grammar; the most that are compiled at the same time
LONG_S, LOW_PRIORITY = 0.5, 15  # seconds after which a grammar's thread has this priority, as of nice(1)
KEPT = 64  # compiled grammars that are kept for the requests that come
MOST_MULTIPLE = 10_000  # a larger multipleOf takes the library seconds
MOST_CALLS = 16  # in one answer
# At one place a blank, or a newline and blanks: without a limit a model may go on with white space for ever.
BLANK = r"\x20|\n[\x20\t]{0,40}"
START = "start: /\\n{0,2}/ value\n"  # newlines may follow a block of reasoning
NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
MISSING = "needs llguidance: pip install -e '.[serve]'"
INSIDE = ("properties", "patternProperties", "$defs", "definitions")  # keys of a schema whose values are objects of schemas
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
ONE = ("items", "additionalProperties")


class SchemaError(ValueError):
    """A schema that cannot be followed. path: of the part that is wrong, such as ".properties.a". at: the number of the tool it is of."""

    def __init__(self, message, path="", at=None):
        super().__init__(message)
        self.path, self.at = path, at


def installed():
    return importlib.util.find_spec("llguidance") is not None


class Grammars:
    """Compiles grammars for one tokenizer. vocab_size: that of the model, which may have more ids. limit_s: seconds for one grammar; by
    default LIMIT_S. It is safe to use in several threads."""

    def __init__(self, tokenizer, vocab_size, limit_s=None):
        """It takes a second for a vocabulary of 150,000."""
        import llguidance

        self._size, self._limit_s, self._free = vocab_size, limit_s, threading.Semaphore(COMPILERS)
        self._library = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=tokenizer.eos_id)
        self._tags = f"open: {self._tag(tokenizer, OPEN)}\nclose: {self._tag(tokenizer, CLOSE)}\n"
        self.compiled = functools.lru_cache(KEPT)(self._compiled)

    def _tag(self, tokenizer, tag):
        """A tag in the library's language. Added tokens, as Qwen's are, are no text to it, but tokens of a number."""
        ids = tokenizer.encode(tag, allow_special=True)
        return f"<[{ids[0]}]>" if len(ids) == 1 and self._library.is_special_token(ids[0]) else json.dumps(tag)

    def json(self, schema):
        """Returns the Grammar of JSON texts of a schema, an object or true. Raises SchemaError."""
        try:
            return self.compiled(f"{START}value: %json {_spaced(schema)}\n")
        except SchemaError as error:
            raise self._placed(error, schema) from None

    def calls(self, form, tools, most=MOST_CALLS):
        """Returns the Grammar of 1 to `most` calls of tools, in the one form of qwen3/messages.py. form: a key of tool_calls.STARTS. Raises
        SchemaError, with the path in the tool, such as ".function.parameters.properties.a"."""
        rule = {"hermes": _hermes, "qwen3_coder": _coder}[form]
        rules = [rule(i, tool["function"]) for i, tool in enumerate(tools)]
        names = " | ".join(f"call{i}" for i in range(len(tools)))
        more = f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""
        try:
            return self.compiled(f"{START}value: call{more}\ncall: {names}\n{self._tags}{''.join(rules)}")
        except SchemaError as error:
            for i, tool in enumerate(tools):
                schema = tool["function"].get("parameters")
                if schema is not None:
                    found = self._placed(error, schema)
                    if found.path or self._wrong(schema):
                        raise SchemaError(str(found), f".function.parameters{found.path}", i) from None
            raise

    def _compiled(self, text):
        """Returns the Grammar of a text in the library's own language, made in a thread, since it may take too long."""
        limit_s = self._limit_s or LIMIT_S
        if not self._free.acquire(timeout=limit_s):
            raise SchemaError("other schemas are being compiled; try again later")
        found = []

        def compile():
            try:
                found.append(self._compile(text))
            except Exception as error:  # raised again below
                found.append(error)
            finally:
                self._free.release()

        thread = threading.Thread(target=compile, name="grammar", daemon=True)
        thread.start()
        thread.join(LONG_S)
        if thread.is_alive():
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread.native_id, LOW_PRIORITY)  # of this thread alone
            thread.join(limit_s - LONG_S)
        if not found:
            raise SchemaError(f"it takes longer than {limit_s:g} s to compile; make it simpler")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _compile(self, text):
        import llguidance

        matcher = llguidance.LLMatcher(self._library, text, log_level=0, limits=_limits())
        if matcher.is_error():
            raise SchemaError(_words(matcher.get_error()))
        grammar = Grammar(text, matcher, self._size)
        try:
            grammar.start().allowed(self._size)  # the first mask costs the most, and shows what is too large
        except GuideError as error:
            raise SchemaError(_words(str(error))) from None
        return grammar

    def _wrong(self, schema, root=None):
        """The library's words for what is wrong with a schema; "" where nothing is. root: the schema whose definitions it may use."""
        import llguidance

        definitions = {key: root[key] for key in ("$defs", "definitions") if isinstance(root, dict) and key in root}
        text = f"start: %json {_spaced({**definitions, **schema} if isinstance(schema, dict) else schema)}\n"
        return _words(llguidance.LLMatcher.validate_grammar(text, None, limits=_limits()))

    def _placed(self, error, schema):
        """The SchemaError with the path of the innermost part of the schema that is wrong."""
        path, words, at = "", str(error), schema
        while found := next(((step, part, wrong) for step, part in _parts(at) if (wrong := self._wrong(part, schema))), None):
            path, at, words = path + found[0], found[1], found[2]
        return SchemaError(words, path)


class Grammar:
    """A compiled grammar, of which each text gets a matcher of its own. text: the grammar in the library's language."""

    def __init__(self, text, matcher, size):
        self.text, self._matcher, self._size = text, matcher, size

    def start(self):
        return Matcher(self._matcher.deep_copy(), self._size)


class Matcher:
    """The state of one text."""

    def __init__(self, matcher, size):
        self._matcher, self._bits = matcher, np.zeros(-(-size // 32), np.int32)

    def allowed(self, size):
        """Returns bool [size]: the tokens that may come next. Raises GuideError where the work of a step has its limit."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise GuideError(self._matcher.get_error())
        return np.unpackbits(self._bits.view(np.uint8), count=size, bitorder="little").astype(bool)

    def take(self, token):
        """Notes the next token. Raises GuideError for one that does not follow the grammar."""
        if not self._matcher.consume_token(token):
            raise GuideError(self._matcher.get_error())


def _limits():
    import llguidance

    return llguidance.LLParserLimits(verbose_errors=False)


def _words(text):
    """The reason in an error of the library, on one line."""
    text = text.partition("failed to compile JSON schema: ")[2] or text
    return " ".join(re.split(r"\n\s*1 \||<non-verbose/>", text)[0].split())[:300]


def _parts(schema):
    """The schemas directly inside a schema, as (step of the path, schema)."""
    if not isinstance(schema, dict):
        return
    for key in INSIDE:
        if isinstance(schema.get(key), dict):
            yield from ((f".{key}.{name}", part) for name, part in schema[key].items())
    for key in LISTS:
        if isinstance(schema.get(key), list):
            yield from ((f".{key}[{i}]", part) for i, part in enumerate(schema[key]))
    for key in ONE:
        if isinstance(schema.get(key), dict):
            yield f".{key}", schema[key]


def _spaced(schema):
    """The JSON of a schema, with our rule of white space. Raises SchemaError for a multipleOf that takes too long."""
    _check_multiples(schema, "")
    if schema is True:
        schema = {}
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": BLANK}} if isinstance(schema, dict) else schema)


def _check_multiples(schema, path):
    number = schema.get("multipleOf") if isinstance(schema, dict) else None
    if isinstance(number, int | float) and not 1 / MOST_MULTIPLE <= number <= MOST_MULTIPLE:
        raise SchemaError(f"multipleOf={short(number)} must be from {1 / MOST_MULTIPLE:g} to {MOST_MULTIPLE}", path)
    for step, part in _parts(schema):
        _check_multiples(part, path + step)


def _name(i, function):
    name = function["name"]
    if not NAME.fullmatch(name):
        raise SchemaError(f"{short(name)} cannot be called for certain; use letters, digits and _ . : / -", ".function.name", i)
    return name


def _hermes(i, function):
    """The rule call{i} of a function, in the form that tool_calls.HEADER reads."""
    schema = function.get("parameters")
    schema = {"type": "object"} if schema in (None, {}) else {"type": "object", **schema} if isinstance(schema, dict) else schema
    head = json.dumps(f'\n{{"name": "{_name(i, function)}", "arguments": ')
    return f'call{i}: open {head} arguments{i} "}}\\n" close\narguments{i}: %json {_spaced(schema)}\n'


def _coder(i, function):
    """The rules of a function in the form of Qwen3-Coder. A parameter of text is free text, since it ends where its tag does."""
    root = function.get("parameters") if isinstance(function.get("parameters"), dict) else {}
    properties = root.get("properties") if isinstance(root.get("properties"), dict) else {}
    required = root.get("required") if isinstance(root.get("required"), list) else []
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    rules, body = [], []
    for j, (key, schema) in enumerate(properties.items()):
        if not NAME.fullmatch(key):
            raise SchemaError(
                f"{short(key)} cannot be written for certain; use letters, digits and _ . : / -", ".function.parameters.properties", i
            )
        head, rule = json.dumps(f"<parameter={key}>\n"), f"p{i}x{j}"
        body.append(rule if key in required else f"{rule}?")
        if isinstance(schema, dict) and schema.get("type") == "string":
            values = [value for value in schema.get("enum") or [] if isinstance(value, str)]
            if values:
                choice = " | ".join(json.dumps(f"{value}\n</parameter>\n") for value in values)
                rules.append(f"{rule}: {head} ({choice})\n")
            else:
                rules.append(f'{rule}: {head} {rule}v\n{rule}v[suffix="\\n</parameter>\\n"]: /(?s:.*)/\n')
        else:
            inner = {**definitions, **schema} if isinstance(schema, dict) else schema
            rules.append(f'{rule}: {head} {rule}v "\\n</parameter>\\n"\n{rule}v: %json {_spaced(inner)}\n')
    head = json.dumps(f"\n<function={_name(i, function)}>\n")
    return f'call{i}: open {head} {" ".join(body)} "</function>\\n" close\n{"".join(rules)}'
