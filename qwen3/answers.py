"""Splits an assistant's text into its reasoning, its content and its tool calls, while the text grows.

    answer = Answer("hermes", tools, thinking="before")
    for text in texts:
        pieces += answer.push(text)
    pieces += answer.finish()

A piece is ("reasoning", text), ("content", text), ("call", name) or ("arguments", JSON text); the arguments are those of the last call.
The pieces, joined, are the same wherever the text is cut. A call whose text is broken or incomplete is content, and a call inside the
reasoning is reasoning. Newlines between the parts, which chat templates write, belong to none of them.
"""

import re
from dataclasses import dataclass

from qwen3 import tool_calls
from qwen3.tokenizer import IM_START

THINK, THINK_END, BLANK = "<think>", "</think>", " \t\r\n"


@dataclass(frozen=True)
class Forms:
    """How a model writes its answers. calls: a key of tool_calls.STARTS, or None for no calls. thinks: whether it may reason."""

    calls: str | None
    thinks: bool


def forms_of(template, calls="auto", reasoning="auto"):
    """The Forms that a chat template asks for. calls, reasoning: the flags --tool_calls and --reasoning, which override it unless they are
    "auto"."""
    found = tool_calls.form_of(template) if calls == "auto" else None if calls == "none" else calls
    return Forms(found, THINK_END in (template or "") if reasoning == "auto" else reasoning == "tags")


def thinking_at(prompt):
    """Where an answer to a prompt, a chat template's text, begins: "inside" a block of reasoning that the prompt opens; "answer": after
    one, which the prompt closes; else "before" one."""
    turn = prompt[prompt.rfind(IM_START) + 1 :]
    opened, closed = turn.rfind(THINK), turn.rfind(THINK_END)
    return "inside" if opened > closed else "answer" if closed >= 0 else "before"


class Answer:
    """The text of one answer while it grows.

    form: that of its calls, a key of tool_calls.STARTS; None looks for no calls. tools: in the one form of qwen3/messages.py. thinking: see
    thinking_at(); "answer" looks for no reasoning. live: the text of a call is sure to be one, see tool_calls.JsonCall. most_calls: the
    answer ends after so many calls. calls: their number so far. ended: whether it has ended.
    """

    def __init__(self, form=None, tools=None, thinking="answer", live=False, most_calls=None):
        self.calls, self.ended = 0, False
        self._form, self._tools, self._state, self._live, self._most = form, tools, thinking, live, most_calls
        self._text, self._call, self._space, self._counted, self._has_content = "", None, "", False, False
        self._dropped = "\n" if thinking == "inside" else ""  # characters that are left out where the next part begins

    def push(self, text):
        """Adds text. Returns the pieces that are certain by now."""
        self._text += text
        return self._read(final=False)

    def finish(self):
        """Returns the remaining pieces, when no more text comes."""
        return self._read(final=True)

    def _read(self, final):
        pieces = []
        while not self.ended and self._step(pieces, final):
            pass
        return pieces

    def _step(self, pieces, final):
        """Reads a part of the text. Returns False where nothing more is certain."""
        if self._state == "before":
            return self._begin(final)
        if self._state == "inside":
            return self._reason(pieces, final)
        return self._read_call(pieces, final) if self._call else self._find_call(pieces, final)

    def _begin(self, final):
        rest = self._text.lstrip()
        if THINK.startswith(rest) and rest != THINK and not final:
            return False
        self._state = "inside" if rest.startswith(THINK) else "answer"
        if self._state == "inside":
            self._text, self._dropped = rest[len(THINK) :], "\n"
        return True

    def _reason(self, pieces, final):
        end = self._text.find(THINK_END)
        known = end if end >= 0 else len(self._text) if final else _certain(self._text, (THINK_END,), "\n")
        said = self._text[:known]
        self._say(pieces, "reasoning", said.rstrip("\n") if end >= 0 or final else said)
        self._text = self._text[known:]
        if end < 0:
            return False
        self._text, self._state, self._dropped = self._text[len(THINK_END) :], "answer", "\n"
        return True

    def _find_call(self, pieces, final):
        starts = tool_calls.STARTS.get(self._form, ())
        found = re.search("|".join(map(re.escape, starts)), self._text) if starts else None
        if found:
            before = self._text[: found.start()]
            body = before.rstrip()
            self._say(pieces, "content", body)
            self._space, self._text = before[len(body) :], self._text[found.start() :]
            self._call, self._counted = tool_calls.CALLS[self._form](self._tools, self._live), False
            return True
        known = len(self._text) if final or not starts else _certain(self._text, starts, None)
        if not (final and self.calls and not self._text.strip()):
            self._say(pieces, "content", self._text[:known])
        self._text = self._text[known:]
        return False

    def _read_call(self, pieces, final):
        call = self._call
        status = call.read(self._text, final)
        if status == tool_calls.BAD:  # its first tag is content, and what follows is looked at again
            first = next(start for start in tool_calls.STARTS[self._form] if self._text.startswith(start))
            self._say(pieces, "content", self._space + first)
            self._text, self._call = self._text[len(first) :], None
            return True
        if (self._live or status == tool_calls.DONE) and call.pieces:
            self.calls += not self._counted
            self._counted = True
            pieces += call.pieces
            call.pieces = []
        if status == tool_calls.MORE:
            return False
        self._text, self._call = self._text[call.used :], None
        self._dropped = "" if self._has_content else BLANK
        self.ended = self._most is not None and self.calls >= self._most
        return True

    def _say(self, pieces, kind, text):
        text = text.lstrip(self._dropped) if self._dropped else text
        if not text:
            return
        self._dropped = ""
        self._has_content = self._has_content or kind == "content"
        if pieces and pieces[-1][0] == kind:
            text = pieces.pop()[1] + text
        pieces.append((kind, text))


def _certain(text, tags, blank):
    """Returns the length of the text without what a tag may begin with at its end, and without blanks before that. blank: characters;
    None: white space."""
    longest = max(map(len, tags)) - 1
    held = next((n for n in range(min(longest, len(text)), 0, -1) if any(tag.startswith(text[-n:]) for tag in tags)), 0)
    return len(text[: len(text) - held].rstrip(blank))


def message(pieces):
    """The assistant's message of an answer's pieces: role, content, and where there are some reasoning_content and tool_calls, whose
    arguments are JSON text. A message of calls alone has the content None, as in OpenAI's API."""
    reasoning = "".join(text for kind, text in pieces if kind == "reasoning")
    content = "".join(text for kind, text in pieces if kind == "content")
    calls = []
    for kind, text in pieces:
        if kind == "call":
            calls.append({"type": "function", "function": {"name": text, "arguments": ""}})
        elif kind == "arguments":
            calls[-1]["function"]["arguments"] += text
    found = {"role": "assistant", "content": content or (None if calls else "")}
    return {**found, **({"reasoning_content": reasoning} if reasoning else {}), **({"tool_calls": calls} if calls else {})}
