"""Builds the OpenAI API's answers from the engine's events: complete ones, and the chunks of a stream."""

import json
import secrets
import time

from qwen3.text_stream import TextStream

NAMES = {"chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"), "completion": ("cmpl", "text_completion", "text_completion")}


class Choice:
    """One generated text, while it grows. reason: the finish reason, None until it has ended. entries: its logprobs entries, each with the
    token's offset: the number of whole characters of the text before its first byte."""

    def __init__(self, tokenizer, asked):
        self.tokenizer, self.asked = tokenizer, asked
        self.stream, self.text, self.entries, self.reason = TextStream(tokenizer, asked.stop), "", [], None
        self.tokens, self.offset = 0, 0
        self.whole = TextStream(tokenizer)  # the text of all tokens so far, for their places in it

    def push(self, event):
        """Adds an event of the engine. Returns (new text, its logprobs entries)."""
        self.tokens += 1
        text, entries, ends = "", [], event.finish_reason == "stop"  # the token is a stop id, which is not part of the text
        if not ends:
            text = self.stream.push(event.token)
            entries = [] if self.asked.logprobs is None else [self._entry(event)]
        self.reason = "stop" if self.stream.stopped else event.finish_reason
        if self.reason:
            text += self.stream.finish()
        self.text, self.entries = self.text + text, self.entries + entries
        return text, entries

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
        found = [self._choice(i, {"role": "assistant", "content": c.text}, c.text, c.entries, c.reason) for i, c in enumerate(choices)]
        if self.kind == "chat":
            for choice in found:
                choice["message"] = choice.pop("delta")
        return {**self.head, "object": self.whole_name, "choices": found, "usage": self.usage(choices)}

    def usage(self, choices):
        new = sum(choice.tokens for choice in choices)
        before = self.asked.prompt_tokens
        return {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new}

    def opening(self, index):
        """Returns the first chunk of a choice of a chat; None for a completion, which has none."""
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""}, "", [], None)]) if self.kind == "chat" else None

    def chunk(self, index, text, entries, reason):
        return self._chunk([self._choice(index, {"content": text} if text or entries else {}, text, entries, reason)])

    def last(self, choices):
        """Returns the last chunk, with the token counts of all choices."""
        return {**self._chunk([]), "usage": self.usage(choices)}

    def _chunk(self, choices):
        return {**self.head, "object": self.chunk_name, "choices": choices}

    def _choice(self, index, delta, text, entries, reason):
        logprobs = None if self.asked.logprobs is None else self._logprobs(entries)
        content = {"delta": delta} if self.kind == "chat" else {"text": text}
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
