"""The values of a JSON file one by one: the elements of an array, or objects after one another, without holding the file."""

import codecs
import json

from parallel.json_text import distinct

CHUNK = 1 << 20  # bytes
EDGE = 16  # characters: an error nearer to the end of what is read may be a value cut there


class JsonStream:
    """stream: binary, UTF-8, with or without a byte-order mark. Errors are ValueErrors with the line as their attribute."""

    def __init__(self, stream):
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._line, self._ended, self._broken = "", 0, 1, False, None
        self._json = json.JSONDecoder(object_pairs_hook=distinct)

    def records(self):
        """(line, value) of the elements of an array, or of values after one another, as far as they can be read."""
        if self._next() != "[":
            while self._next():
                yield self._value()
            return
        self._move(self._place + 1)
        if self._next() != "]":
            yield self._value()
        while self._next() == ",":
            self._move(self._place + 1)
            self._next()
            yield self._value()
        if self._next() != "]":
            raise self._error(f"not JSON: {self._next()!r} where the array must go on or end" if self._next() else "the array has no end")
        self._move(self._place + 1)
        if self._next():
            raise self._error("not JSON: more text after the array")

    def _error(self, message, ahead=0):
        error = ValueError(message)
        error.line = self._line + self._text.count("\n", self._place, self._place + ahead)
        return error

    def _move(self, place):
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _more(self):
        """Reads as much again as is held, so that a long value is parsed a few times only."""
        if self._broken:
            raise self._error(f"not UTF-8: {self._broken.reason}", ahead=len(self._text))
        self._text, self._place = self._text[self._place :], 0
        data = self._stream.read(max(CHUNK, len(self._text)))
        self._ended = not data
        try:
            self._text += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as e:
            self._text += e.object[: e.start].decode("utf-8")  # what comes before is still good
            self._broken, self._ended = e, False

    def _next(self):
        """The next character that is not white space, which stays; "" at the end."""
        while True:
            place, size = self._place, len(self._text)
            while place < size and self._text[place] in " \t\r\n":
                place += 1
            self._move(place)
            if place < size or self._ended:
                return self._text[place : place + 1]
            self._more()

    def _value(self):
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._place)
            except json.JSONDecodeError as e:
                cut = e.msg.startswith("Unterminated string") or e.pos > len(self._text) - EDGE
                if self._ended or not cut:
                    raise self._error(f"not JSON: {e.msg}", e.pos - self._place) from e
            except (ValueError, RecursionError) as e:  # too long a number, too many brackets
                raise self._error(f"not JSON: {e}") from e
            else:
                if end < len(self._text) or self._ended or self._text[self._place] in '{["':
                    line = self._line
                    self._move(end)
                    return line, value
            self._more()
