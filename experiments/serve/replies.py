"""Builds the OpenAI API's answers from the engine's events: complete ones, and the chunks of a stream."""

import json
import secrets
import time

from qwen3.answers import Answer, message
from qwen3.text_stream import TextStream

NAMES = {"chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"), "completion": ("cmpl", "text_completion", "text_completion")}


class Choice:
    """One generated text, while it grows. reason: the finish reason, None until it has ended. pieces: those of qwen3.answers so far, and
    ids: of its tool calls. entries: its logprobs entries, each with the token's offset: the number of whole characters of the text before
    its first byte."""

    def __init__(self, tokenizer, asked):
        self.tokenizer, self.asked = tokenizer, asked
        self.stream, self.pieces, self.ids, self.entries, self.reason = TextStream(tokenizer, asked.stop), [], [], [], None
        self.answer = Answer(**asked.answer) if asked.answer else None
        self.tokens, self.offset = 0, 0
        self.whole = TextStream(tokenizer)  # the text of all tokens so far, for their places in it

    def push(self, event):
        """Adds an event of the engine. Returns (new pieces, its logprobs entries)."""
        self.tokens += 1
        text, entries, ends = "", [], event.finish_reason == "stop"  # the token is a stop id, which is not part of the text
        if not ends:
            text = self.stream.push(event.token)
            entries = [] if self.asked.logprobs is None else [self._entry(event)]
        reason = "stop" if self.stream.stopped else event.finish_reason
        if reason:
            text += self.stream.finish()
        pieces, self.reason = self._split(text, reason)
        self.ids += [f"call_{secrets.token_hex(12)}" for kind, _ in pieces if kind == "call"]
        self.pieces += pieces
        if not self.asked.stream:  # a stream has sent them
            self.entries += entries
        return pieces, entries

    def _split(self, text, reason):
        """Returns (the pieces of new text, the finish reason)."""
        if self.answer is None:
            return [("content", text)] if text else [], reason
        pieces = self.answer.push(text) + (self.answer.finish() if reason else [])
        return pieces, "tool_calls" if self.answer.ended or (reason == "stop" and self.answer.calls) else reason

    @property
    def text(self):
        """All text of the content."""
        return "".join(text for kind, text in self.pieces if kind == "content")

    @property
    def message(self):
        found = message(self.pieces)
        for call, i in zip(found.get("tool_calls", []), self.ids):
            call["id"] = i
        return found

    def _entry(self, event):
        top = [self._token(token, logprob) for token, logprob in event.top_logprobs]
        entry = {**self._token(event.token, event.logprob), "top_logprobs": top, "offset": self.offset}
        self.offset += len(self.whole.push(event.token))  # whole characters: one that tokens share counts where its last byte comes
        return entry

    def _token(self, token, logprob):
        data = self.tokenizer.bytes_of(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


class Reply:
    """Builds the JSON of the answers to one request. kind: "chat" or "completion"."""

    def __init__(self, kind, model, asked):
        prefix, self.whole_name, self.chunk_name = NAMES[kind]
        self.kind, self.asked = kind, asked
        self.head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, choices):
        found = []
        for i, choice in enumerate(choices):
            content = {"message": choice.message} if self.kind == "chat" else {"text": self._echoed(i) + choice.text}
            found.append(self._choice(i, content, choice.entries, choice.reason))
        return {**self.head, "object": self.whole_name, "choices": found, "usage": self.usage(choices)}

    def _echoed(self, index):
        """The text of the prompt, where the answer begins with it."""
        return self.asked.echo[index // self.asked.n] if self.asked.echo else ""

    def usage(self, choices):
        new = sum(choice.tokens for choice in choices)
        before = self.asked.prompt_tokens
        return {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new}

    def opening(self, index):
        """Returns the first chunk of a choice: the role of a chat, and the prompt of a completion that has it; None without either. A chat
        whose answer may have calls alone has no content yet."""
        if self.kind == "chat":
            content = {"delta": {"role": "assistant", "content": None if self.asked.answer else ""}}
        else:
            content = {"text": self._echoed(index)}
        return self._chunk([self._choice(index, content, [], None)]) if self.kind == "chat" or self.asked.echo else None

    def chunks(self, index, choice, pieces, entries):
        """Returns the chunks of new pieces of a choice and their logprobs entries; the last one has the finish reason."""
        if self.kind == "completion":
            deltas = [{"text": "".join(text for _, text in pieces)}]
        else:
            deltas = [{"delta": delta} for delta in self._deltas(choice, pieces)] or [{"delta": {"content": ""} if entries else {}}]
            if choice.reason and choice.message["content"] == "" and self.asked.answer:
                deltas[-1]["delta"].setdefault("content", "")
        return [
            self._chunk([self._choice(index, delta, [] if i else entries, choice.reason if i == len(deltas) - 1 else None)])
            for i, delta in enumerate(deltas)
        ]

    def _deltas(self, choice, pieces):
        number = len(choice.ids) - sum(kind == "call" for kind, _ in pieces) - 1  # of the last call before these pieces
        for kind, text in pieces:
            if kind == "call":
                number += 1
                function = {"name": text, "arguments": ""}
                yield {"tool_calls": [{"index": number, "id": choice.ids[number], "type": "function", "function": function}]}
            elif kind == "arguments":
                yield {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
            else:
                yield {"reasoning_content" if kind == "reasoning" else "content": text}

    def last(self, choices):
        """Returns the last chunk, with the token counts of all choices."""
        return {**self._chunk([]), "usage": self.usage(choices)}

    def _chunk(self, choices):
        return {**self.head, "object": self.chunk_name, "choices": choices}

    def _choice(self, index, content, entries, reason):
        logprobs = None if self.asked.logprobs is None else self._logprobs(entries)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, entries):
        if self.kind == "chat":
            return {"content": [{key: value for key, value in entry.items() if key != "offset"} for entry in entries]}
        columns = {"tokens": "token", "token_logprobs": "logprob", "text_offset": "offset"}
        top = [{t["token"]: t["logprob"] for t in entry["top_logprobs"]} for entry in entries]
        return {**{name: [entry[key] for entry in entries] for name, key in columns.items()}, "top_logprobs": top}


def event(value):
    """Returns a server-sent event with a JSON value, as bytes."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def error(message, param=None, code=None, status=400):
    """Returns OpenAI's error object."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
