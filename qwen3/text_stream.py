"""Turns token ids into text while they are generated: only complete characters, and nothing from a stop string on.

    stream = TextStream(tokenizer, stop=("\\n\\n",))
    for token in tokens:
        text += stream.push(token)
        if stream.stopped:
            break
    text += stream.finish()

A token may end inside a character or inside a stop string, so text that could be the start of either waits for the next token.
"""

import codecs


def printable(text):
    """Returns a text that is safe to print: characters that could move a terminal's cursor, or change its colours or title, are escaped as
    in Python, such as \\x1b. Newlines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class TextStream:
    """A stream whose texts, joined, are Tokenizer.decode of the ids.

    stop: non-empty strings; the text ends before the stop string that is complete first. skip_special: special tokens give no text.
    stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer, stop=(), skip_special=True):
        if "" in stop:
            raise ValueError("stop='' is empty, which would stop every text at once; give text")
        self._tokenizer, self._stop, self._skip_special = tokenizer, tuple(stop), skip_special
        self._decoder, self._pending, self.stopped = codecs.getincrementaldecoder("utf-8")("replace"), "", False

    def push(self, token):
        """Adds one id. Returns the new text that is certain to belong to the output; "" after a stop string."""
        return self._pushed(self._tokenizer.bytes_of(token, self._skip_special), final=False)

    def finish(self):
        """Returns the remaining text, after the last id: text that could have become a stop string, and U+FFFD for an incomplete
        character."""
        return self._pushed(b"", final=True)

    def _pushed(self, data, final):
        if self.stopped:
            return ""
        text = self._pending + self._decoder.decode(data, final)
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._pending = True, ""
            return text[: min(found)[1]]  # the one that is complete first, so that token boundaries do not change the result
        certain = len(text) if final else len(text) - self._may_begin(text)
        self._pending = text[certain:]
        return text[:certain]

    def _may_begin(self, text):
        """Returns the length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max(map(len, self._stop), default=0) - 1
        return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
