"""Text from token ids as they come: whole characters only, and cut before a stop string.

    stream = TextStream(tokenizer, stop=("\\n\\n",))
    for token in tokens:
        text += stream.push(token)
        if stream.stopped:
            break
    text += stream.finish()

One place for whoever shows text while it is made, and for stop strings, which may be cut anywhere by tokens.
"""

import codecs


class TextStream:
    """The text so far is what Tokenizer.decode makes of the ids. stop: strings, none empty; nothing of the text is given from the beginning
    of the one on that is complete first. skip_special: special tokens become nothing. stopped: whether a stop string has come."""

    def __init__(self, tokenizer, stop=(), skip_special=True):
        if "" in stop:
            raise ValueError("stop='' is empty, and would stop everything; give text")
        self._tokenizer, self._stop, self._skip_special = tokenizer, tuple(stop), skip_special
        self._decoder, self._held, self.stopped = codecs.getincrementaldecoder("utf-8")("replace"), "", False

    def push(self, token):
        """What is new of the text for certain, after one more id. Nothing once stopped."""
        return self._pushed(self._tokenizer.bytes_of(token, self._skip_special), final=False)

    def finish(self):
        """The rest, after the last id: what might have become a stop string, and U+FFFD for a character that is cut short."""
        return self._pushed(b"", final=True)

    def _pushed(self, data, final):
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data, final)
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]  # the first to be complete, so that it does not matter how tokens cut the text
        sure = len(text) if final else len(text) - self._may_begin(text)
        self._held = text[sure:]
        return text[:sure]

    def _may_begin(self, text):
        """The length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._stop), default=0) - 1
        return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
