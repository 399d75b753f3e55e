"""Reads the tool calls that a model writes into its text, while the text grows, in the two forms that Qwen's chat templates ask for.

    hermes        <tool_call>
                  {"name": "f", "arguments": {"a": 1}}
                  </tool_call>
    qwen3_coder   <tool_call>
                  <function=f>
                  <parameter=a>
                  1
                  </parameter>
                  </function>
                  </tool_call>

Qwen3 and Qwen2.5 write the first form, Qwen3-Coder the second. Source: the chat templates of the released models; Qwen's own
qwen3coder_tool_parser.py, from which the types of parameters and the forgotten <tool_call> of the second form are.
"""

import json
import re

from parallel.json_text import distinct
from qwen3.json_files import MAX_DEPTH

OPEN, CLOSE, FUNCTION, PARAMETER = "<tool_call>", "</tool_call>", "<function=", "<parameter="
FUNCTION_END, PARAMETER_END = "</function>", "</parameter>"
STARTS = {"hermes": (OPEN,), "qwen3_coder": (OPEN, FUNCTION)}  # form -> the texts with which a call begins
MORE, BAD, DONE = "more", "bad", "done"
MOST_SCALAR, MOST_NAME, MOST_REFS = 400, 256, 8  # characters of a number, and of a name; references that are followed
PAIRS = {"}": "{", "]": "["}
SPACE = re.compile(r"\s*")
JSON_SPACE = re.compile(r"[ \t\r\n]*")
# A model often writes a newline into a text without escaping it; JSON would not have it, and the parser of the value is told to take it.
STRING_PART = re.compile(r'(?:[^"\\]+|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*')
ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
SCALAR_PART = re.compile(r"[-+.0-9a-zA-Z]*")
SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
HEADER = re.compile(r'\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
NAME = re.compile(rf"([^<>\n]{{1,{MOST_NAME}}})>")
NAME_PART = re.compile(rf"[^<>\n]{{0,{MOST_NAME}}}")


def form_of(template):
    """The form that a chat template asks a model for: "hermes", "qwen3_coder", or None for a template without calls."""
    template = template or ""
    return "qwen3_coder" if FUNCTION in template else "hermes" if OPEN in template else None


class JsonObject:
    """Finds the end of a JSON object that starts at a place of a text, while the text grows. end: the place after it, once it is there.
    bad: whether no object can come of the text."""

    def __init__(self, at):
        self.at, self.end, self.bad = at, None, False
        self._open, self._next, self._in_string = [], "object", False

    def read(self, text):
        while self.end is None and not self.bad and self._step(text):
            pass

    def _step(self, text):
        """Reads one token. Returns False where more text is needed, or none helps."""
        if self._in_string:
            return self._string(text)
        at = self.at = JSON_SPACE.match(text, self.at).end()
        if at == len(text):
            return False
        c, wanted = text[at], self._next
        if c == '"' and wanted in ("key", "first key", "value", "first value"):
            self._in_string = True
        elif (c == "{" and wanted in ("object", "value", "first value")) or (c == "[" and wanted in ("value", "first value")):
            if len(self._open) == MAX_DEPTH:
                self.bad = True
            self._open.append(c)
            self._next = "first key" if c == "{" else "first value"
        elif c in "}]" and wanted in ("next", "first key" if c == "}" else "first value") and self._open[-1] == PAIRS[c]:
            self._open.pop()
            self._next = "next"
            self.end = None if self._open else at + 1
        elif c == "," and wanted == "next":
            self._next = "key" if self._open[-1] == "{" else "value"
        elif c == ":" and wanted == "colon":
            self._next = "value"
        elif wanted in ("value", "first value"):
            return self._scalar(text)
        else:
            self.bad = True
        self.at += 1
        return True

    def _string(self, text):
        at = self.at = STRING_PART.match(text, self.at).end()
        if at == len(text):
            return False
        if text[at] != '"':
            self.bad = not ESCAPE_BEGUN.fullmatch(text, at)
            return False
        self._in_string, self.at = False, at + 1
        self._next = "colon" if self._next in ("key", "first key") else "next"
        return True

    def _scalar(self, text):
        end = SCALAR_PART.match(text, self.at).end()
        if end == len(text) and self.at < end < self.at + MOST_SCALAR:
            return False
        self.bad = not SCALAR.fullmatch(text, self.at, end)
        self.at, self._next = end, "next"
        return True


class JsonCall:
    """A call of the form "hermes". read() is given the text from the call's first tag on, each time with more at its end; final: no more
    comes. It returns MORE, BAD or DONE; used: then the characters of the call.

    pieces: what is known of the call and not fetched yet, ("call", name) once and then ("arguments", JSON text) one or more times. live:
    the text is sure to be a call, because a grammar makes it one, so its pieces are there while it grows; else they are there at the end.
    """

    def __init__(self, tools, live=False):
        self.pieces, self.used, self._live = [], 0, live
        self._object, self._arguments, self._given = JsonObject(len(OPEN)), None, 0

    def read(self, text, final):
        if self._live:
            self._stream(text)
        self._object.read(text)
        end = self._object.end
        if self._object.bad or (end is None and final):
            return self._broken(len(text) if final else self._object.at)
        if end is None:
            return MORE
        status, self.used = _closed(text, end, final)
        if status == BAD:
            return self._broken(end)
        return self._read_whole(text[len(OPEN) : end]) if status == DONE and self._arguments is None else status

    def _stream(self, text):
        """Adds the pieces of a call whose text is sure to be one."""
        if self._arguments is None and (found := HEADER.match(text, len(OPEN))):
            self.pieces += [("call", json.loads(found[1]))]
            self._arguments, self._given = JsonObject(found.end()), found.end()
        if self._arguments is not None:
            self._arguments.read(text)
            end = self._arguments.end or len(text)
            if end > self._given:
                self.pieces.append(("arguments", text[self._given : end]))
                self._given = end

    def _broken(self, used):
        """A call of which pieces were given already ends where its text does; it cannot be text any more."""
        self.used = used
        return BAD if self._arguments is None else DONE

    def _read_whole(self, text):
        try:
            found = json.loads(text, strict=False, object_pairs_hook=distinct)
            arguments = found.get("arguments", {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments, strict=False, object_pairs_hook=distinct)
        except (ValueError, RecursionError):
            return BAD
        name = found.get("name")
        if not isinstance(name, str) or not name.strip() or not _is_unicode(name) or not isinstance(arguments, dict):
            return BAD
        self.pieces = [("call", name), ("arguments", dumps(arguments))]
        return DONE


class XmlCall:
    """A call of the form "qwen3_coder"; see JsonCall. tools: in the one form of qwen3/messages.py, for the types of parameters."""

    def __init__(self, tools, live=False):
        self.pieces, self.used, self._given = [], 0, []
        self._tools = {tool["function"]["name"]: tool["function"] for tool in tools or []}
        self._live, self._at, self._stage, self._look = live, 0, "open", 0
        self._name, self._key, self._keys = None, None, set()

    def read(self, text, final):
        status = True
        while status is True:
            status = self._step(text, final)
        if status == MORE and final:
            status, self.used = BAD, len(text)
        if self._live:
            self.pieces, self._given = self.pieces + self._given, []
            return DONE if status == BAD and self._name is not None else status
        if status == DONE:
            self.pieces, self._given = [self._given[0], ("arguments", "".join(piece for _, piece in self._given[1:]))], []
        return status

    def _step(self, text, final):
        """Reads one tag, or one value. Returns True, or a status."""
        if self._stage == "value":
            return self._value(text)
        if self._stage == "end":
            status, self.used = _closed(text, self._at, final)
            if status == BAD and not text.startswith(OPEN):  # the model forgot both tags
                return DONE
            return status
        tags = {"open": (OPEN, FUNCTION), "function": (FUNCTION,), "body": (PARAMETER, FUNCTION_END)}[self._stage]
        at = SPACE.match(text, self._at).end()
        tag = next((tag for tag in tags if text.startswith(tag, at)), None)
        if tag is None:
            self.used = at
            return MORE if any(tag.startswith(text[at:]) for tag in tags) else BAD
        at += len(tag)
        if tag == OPEN:
            self._stage, self._at = "function", at
        elif tag == FUNCTION_END:
            self._given.append(("arguments", "}" if self._keys else "{}"))
            self._stage, self._at = "end", at
            self.used = at
        else:
            return self._named(text, at, tag)
        return True

    def _named(self, text, at, tag):
        found = NAME.match(text, at)
        if not found:
            self.used = at
            return MORE if NAME_PART.fullmatch(text, at) else BAD
        name = found[1].strip()
        if not name or name in self._keys:
            self.used = at
            return BAD
        if tag == FUNCTION:
            self._name, self._stage = name, "body"
            self._given.append(("call", name))
        else:
            self._key, self._stage, self._look = name, "value", found.end()
        self._at = found.end()
        return True

    def _value(self, text):
        end = text.find(PARAMETER_END, self._look)
        if end < 0:
            self._look = max(self._at, len(text) - len(PARAMETER_END))
            self.used = len(text)
            return MORE
        value = typed(text[self._at : end].removeprefix("\n").removesuffix("\n"), self._tools.get(self._name), self._key)
        self._given.append(("arguments", f"{', ' if self._keys else '{'}{dumps(self._key)}: {dumps(value)}"))
        self._keys.add(self._key)
        self._at, self._stage = end + len(PARAMETER_END), "body"
        return True


CALLS = {"hermes": JsonCall, "qwen3_coder": XmlCall}


def _closed(text, at, final):
    """Looks for the closing tag of a call at a place. Returns (status, the place after the tag). A text that ends without it is a call."""
    start = SPACE.match(text, at).end()
    if text.startswith(CLOSE, start):
        return DONE, start + len(CLOSE)
    if CLOSE.startswith(text[start:]):
        return (DONE, len(text)) if final else (MORE, at)
    return BAD, at


def dumps(value):
    """The JSON of a value; half a surrogate pair, which UTF-8 does not have, is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if _is_unicode(text) else json.dumps(value)


def _is_unicode(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def typed(text, function, name):
    """The value of a parameter that a model wrote as plain text, by the schema of the function's parameters. It is text where the schema
    has text or says nothing, or where the text is no value of the schema's types."""
    root = (function or {}).get("parameters")
    properties = root.get("properties") if isinstance(root, dict) else None
    kinds = _kinds(properties.get(name), root) if isinstance(properties, dict) else set()
    if not kinds - {"string"}:
        return text
    word = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        value = json.loads(word, strict=False, object_pairs_hook=distinct, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and value.is_integer() and kinds & {"integer"} and "number" not in kinds:
        value = int(value)
    return value if _kind(value) & kinds else text


def _refuse(word):
    raise ValueError(f"{word} is no JSON")


def _kind(value):
    """The names that JSON schemas have for the type of a value."""
    if isinstance(value, bool) or value is None:
        return {"null" if value is None else "boolean"}
    names = {int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"}, dict: {"object"}}
    return names[type(value)]


def _kinds(schema, root, depth=0):
    """The types that a schema allows, as far as it says so in a simple way. root: the schema in which its references are."""
    if not isinstance(schema, dict) or depth > MOST_REFS:
        return set()
    if schema.get("type"):
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return {kind for kind in kinds if isinstance(kind, str)}
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    if values:
        return set().union(*map(_kind, values))
    if isinstance(schema.get("$ref"), str):
        return _kinds(_referred(schema["$ref"], root), root, depth + 1)
    kinds = set()
    for key in ("anyOf", "oneOf", "allOf"):
        for one in schema[key] if isinstance(schema.get(key), list) else []:
            kinds |= _kinds(one, root, depth + 1)
    return kinds or ({"object"} if "properties" in schema else {"array"} if "items" in schema else set())


def _referred(reference, root):
    """What a reference such as #/$defs/Place names; None for one that leads elsewhere."""
    found = root
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found
