"""JSON files: one object per line, or a list whose objects are read one after the other."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lightning_hub.data.readers.examples import RawExample, not_utf8
from lightning_hub.data.readers.limits import ExampleLimits, TooLargeError, texts_inside
from lightning_hub.data.readers.streams import BROKEN_STREAM, numbered_lines, open_stream

_BOM = "\ufeff"
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


def read_jsonl(path: Path, limits: ExampleLimits) -> Iterator[RawExample]:
    """One object in each line; blank lines and a byte order mark at the start are skipped."""
    for number, line in numbered_lines(path, limits):
        where = f"{path}:{number}"
        if isinstance(line, str):
            yield RawExample(where, {}, line)
            continue
        if number == 1:
            line = line.removeprefix(_BOM.encode())
        if not line.isspace() and line:
            yield _parse_line(where, line, limits)


def _parse_line(where: str, line: bytes, limits: ExampleLimits) -> RawExample:
    try:
        value = limits.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RawExample(where, {}, not_utf8(line, error))
    except ValueError as error:
        return RawExample(where, {}, _not_json(line, error))
    return _object(where, value, escaped=b"\\u" in line)


def _not_json(line: bytes, error: Exception) -> str:
    if isinstance(error, TooLargeError):
        return str(error)
    if b"\0" in line:
        return f"not JSON: a NUL byte at byte {line.index(0) + 1}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return f"not JSON: {error}"


def _object(where: str, value: object, *, escaped: bool) -> RawExample:
    """An example from a parsed value; ``escaped``: it can contain half of a surrogate pair."""
    if not isinstance(value, dict):
        return RawExample(where, {}, f"an example must be an object, this is {_json_type(value)}")
    if escaped and any(map(has_lone_surrogate, texts_inside(value))):
        return RawExample(
            where, {}, "a text holds half of a surrogate pair (\\ud800 to \\udfff), which no tokenizer can encode"
        )
    return RawExample(where, value)


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def read_json_examples(path: Path, limits: ExampleLimits) -> Iterator[RawExample]:
    """A list of objects, one object, or lines of objects under the name of ``.json``."""
    window = None
    try:
        with open_stream(path) as stream:
            window = _Window(stream)
            if window.peek() == "[":
                window.position += 1
                yield from _list_examples(path, window, limits)
                return
            whole = _only_object(path, window, limits)
    except UnicodeDecodeError as error:
        line, column = window.place_of(error) if window else (1, 1)
        yield RawExample(f"{path}:{line}", {}, f"not UTF-8: {error.reason} at byte {column} of the line")
        return
    except BROKEN_STREAM as error:
        yield RawExample(f"{path}:{window.line if window else 1}", {}, f"the file is damaged or cut off ({error})")
        return
    if whole is not None:
        yield whole
    else:
        yield from read_jsonl(path, limits)


class _Window:
    """The part of a text file that is in memory: text before the position is freed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._lines_before = 1
        self._counted = 0
        self._broken_at = 0
        self.text = ""
        self.position = 0
        self.ended = False

    @property
    def line(self) -> int:
        """The line of the position."""
        self._lines_before += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._lines_before

    @property
    def ahead(self) -> int:
        """Characters in memory after the position."""
        return len(self.text) - self.position

    def more(self) -> bool:
        """Read as many characters as are ahead, and at least a chunk; False at the end."""
        _ = self.line
        chunk = self._stream.read(max(_CHUNK, self.ahead))
        self._chunk = chunk
        self.text = self.text[self.position :]
        self.position = self._counted = 0
        self.ended = not chunk
        self.text += self._decoder.decode(chunk, final=not chunk)
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]  # matches nothing too
            if self.ahead:
                return self.text[self.position]
            if self.ended or not self.more():
                return ""

    def place_of(self, error: UnicodeDecodeError) -> tuple[int, int]:
        """The line, and the byte in it, of a byte that is not UTF-8."""
        raw = self.text.encode() + error.object[: error.start]
        return self.line + raw.count(b"\n"), len(raw) - raw.rfind(b"\n")


def _list_examples(path: Path, window: _Window, limits: ExampleLimits) -> Iterator[RawExample]:
    """Parse the elements one by one: each has its line, and an error does not hide the examples before it."""
    while window.peek() != "]":
        where = f"{path}:{window.line}"
        try:
            value, end = _next_value(window, limits)
        except ValueError as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            yield RawExample(where, {}, _list_fault(window, error))
            return
        escaped = "\\u" in window.text[window.position : end]
        window.position = end
        yield _object(where, value, escaped=escaped)
        following = window.peek()
        if following == ",":
            window.position += 1
        elif following != "]":
            yield RawExample(where, {}, "not JSON: the list is cut off or a comma is missing after this example")
            return


def _next_value(window: _Window, limits: ExampleLimits) -> tuple[object, int]:
    """The value at the position and its end; more is read while it is not complete.

    Raises:
        ValueError: It is not JSON, or beyond the limits.
    """
    while True:
        if window.ahead > 4 * _CHUNK:
            limits.check_exactly(window.text, window.position)
        try:
            value, end = limits.with_stack(_decoder_at(window.position), window.text)
        except TooLargeError:
            raise
        except ValueError as error:
            far = window.ahead > limits.max_bytes
            inside = isinstance(error, json.JSONDecodeError) and error.pos < len(window.text) - _CHUNK
            if window.ended or (far and inside and not str(error).startswith("Unterminated")):
                raise
            if far:
                raise TooLargeError(f"the example is {limits.too_large}") from error
        else:
            if end < len(window.text) or window.ended:
                if end - window.position > limits.max_bytes:
                    raise TooLargeError(f"the example is {limits.too_large}")
                limits.check(window.text[window.position : end])
                return value, end
        window.more()


def _decoder_at(position: int) -> Callable[[str], tuple[object, int]]:
    return lambda text: json.JSONDecoder().raw_decode(text, position)


def _list_fault(window: _Window, error: Exception) -> str:
    if window.ended and not window.ahead:
        return "not JSON: the list is cut off"
    return f"not JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else _not_json(b"", error)


def _only_object(path: Path, window: _Window, limits: ExampleLimits) -> RawExample | None:
    """The only value of the file; None if the file has none or several."""
    if not window.peek():
        return None
    where = f"{path}:{window.line}"
    try:
        value, end = _next_value(window, limits)
    except TooLargeError as error:
        return RawExample(where, {}, str(error))
    except ValueError:
        return None
    escaped = "\\u" in window.text[window.position : end]
    window.position = end
    return None if window.peek() else _object(where, value, escaped=escaped)
