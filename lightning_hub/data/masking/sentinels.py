"""Marks: how the place of every text is found in what a template made of it.

Each text of a conversation (contents, thoughts, tool names and arguments) is wrapped in two characters that occur
nowhere else, and the conversation is rendered again. Where the marked rendering without its marks equals the plain
one, the marks stand exactly at the edges of the texts, whatever the template is; where a mark is gone, the template
dropped that text. Marks go inside surrounding white space, so that a template that strips texts keeps them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from lightning_hub.data.conversation import BadRowError, Conversation, Message, ToolCall
from lightning_hub.data.masking.chat_template import Turn

Kind: TypeAlias = Literal["text", "thoughts", "tool call", "tool definition"]

_INLINE_THOUGHTS = re.compile(r"(\s*(?:<think>)?)(.*?)(</think>)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Shape:
    """The dialect of a template, found by probing it once.

    Attributes:
        parts: Contents are lists of text parts.
        arguments_as_text: Tool-call arguments are JSON text.
    """

    parts: bool = False
    arguments_as_text: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A marked text, and the white space that was left outside its marks; ``turn`` is -1 for tool definitions."""

    turn: int
    kind: Kind
    text: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a segment's text stands in a rendering: characters ``start`` to ``end``.

    Attributes:
        again: Where a part of a tool call stands once more, as the name in the tool's turn of some templates.
    """

    segment: Segment
    start: int
    end: int
    again: tuple[int, ...] = ()


def plain_turns(conversation: Conversation, shape: Shape) -> list[Turn]:
    """The turns of a conversation of which every message is a role and a text, unmarked, at little cost."""
    if shape.parts:
        return [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in conversation.messages]
    return [{"role": m.role, "content": m.content} for m in conversation.messages]


@dataclass(frozen=True)
class Alphabet:
    """A block of characters to mark with: rare scripts, printable, so that no filter escapes or strips them."""

    first: int
    last: int

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any one mark."""
        return re.compile(f"[{chr(self.first)}-{chr(self.last)}]")


_ALPHABETS = (Alphabet(0x20000, 0x2A6DF), Alphabet(0x17000, 0x187F7), Alphabet(0x12000, 0x12399))
"""CJK extension B, Tangut, cuneiform."""


def choose_alphabet(text: str) -> Alphabet:
    """A block of which the text has no character."""
    for alphabet in _ALPHABETS:
        if text.isascii() or not alphabet.pattern.search(text):
            return alphabet
    raise BadRowError("the text mixes rare Chinese, Tangut and cuneiform signs, and none is left to find turns with")


class Marker:
    """Turns a conversation into template input, with each text marked or left as it is.

    Args:
        shape: The dialect of the template.
        alphabet: What to mark with; None leaves the texts as they are.
        only_ends: Mark only the end of each text, for templates that look at how a text begins.
    """

    def __init__(self, shape: Shape, alphabet: Alphabet | None = None, *, only_ends: bool = False) -> None:
        self.shape = shape
        self.alphabet = alphabet
        self.only_ends = only_ends
        self.segments: list[Segment] = []
        self._turn = -1

    def conversation(self, conversation: Conversation) -> tuple[list[Turn], list[Turn] | None]:
        """The turns and the tool definitions as the template takes them."""
        tools = [self._tool(tool) for tool in conversation.tools] or None
        turns = []
        for self._turn, message in enumerate(conversation.messages):
            turns.append(self._message(message))
        return turns, tools

    def _message(self, message: Message) -> Turn:
        turn: Turn = {"role": message.role}
        if message.reasoning:
            thoughts = self._wrap(message.reasoning, "thoughts")
            turn |= {"reasoning_content": thoughts, "thinking": thoughts}
        content = self._content(message)
        turn["content"] = [{"type": "text", "text": content}] if self.shape.parts else content
        if message.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": self._call(call)} | ({"id": call.id} if call.id else {})
                for call in message.tool_calls
            ]
        if message.name is not None:
            turn["name"] = message.name
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        return turn

    def _content(self, message: Message) -> str:
        if message.role == "assistant" and "</think>" in message.content:
            inline = _INLINE_THOUGHTS.fullmatch(message.content)
            assert inline, "the pattern matches every text with </think>"
            opening, thoughts, closing, rest = inline.groups()
            return opening + self._wrap(thoughts, "thoughts") + closing + self._wrap(rest, "text")
        return self._wrap(message.content, "text")

    def _call(self, call: ToolCall) -> Turn:
        name = self._wrap(call.name, "tool call")
        marked = {self._wrap(key, "tool call"): self._value(value) for key, value in call.arguments.items()}
        return {
            "name": name,
            "arguments": json.dumps(marked, ensure_ascii=False) if self.shape.arguments_as_text else marked,
        }

    def _value(self, value: object) -> object:
        if isinstance(value, str):
            return self._wrap(value, "tool call")
        if isinstance(value, dict):
            return {key: self._value(item) for key, item in value.items()}
        return [self._value(item) for item in value] if isinstance(value, list) else value

    def _tool(self, tool: Mapping[str, object]) -> Turn:
        function = tool.get("function")
        if self.alphabet is None or not isinstance(function, dict):
            return dict(tool)
        key = "description" if isinstance(function.get("description"), str) else "name"
        return {**tool, "function": {**function, key: self._wrap(str(function.get(key, "")), "tool definition")}}

    def _wrap(self, text: str, kind: Kind) -> str:
        if self.alphabet is None or not (core := text.strip()):
            return text
        opening = self.alphabet.first + 2 * len(self.segments)
        if opening + 1 > self.alphabet.last:
            raise BadRowError("the conversation has too many texts to find them all")
        start = text.index(core)
        end = start + len(core)
        self.segments.append(Segment(self._turn, kind, core, text[:start], text[end:]))
        return text[:start] + ("" if self.only_ends else chr(opening)) + core + chr(opening + 1) + text[end:]


@dataclass(frozen=True)
class Traced:
    """A rendering whose texts have been found.

    Attributes:
        text: The rendering, without marks.
        segments: All texts that went in.
        places: Those that came out, in the order of the rendering.
    """

    text: str
    segments: tuple[Segment, ...]
    places: tuple[Place, ...]

    def lost(self) -> list[Segment]:
        """Texts that went in and did not come out."""
        found = {id(place.segment) for place in self.places}
        return [segment for segment in self.segments if id(segment) not in found]

    def rewritten(self) -> list[Segment]:
        """Texts that came out in other words; JSON escapes count as the same."""
        return [place.segment for place in self.places if not _same(place, self.text)]

    def tail(self) -> str:
        """What follows the last text."""
        return self.text[max((place.end for place in self.places), default=0) :]


def _same(place: Place, text: str) -> bool:
    came_out, went_in = text[place.start : place.end].strip(), place.segment.text
    return came_out in (went_in, json.dumps(went_in, ensure_ascii=False)[1:-1])


def trace(rendered: str, segments: Sequence[Segment], alphabet: Alphabet) -> Traced:
    """Read the marks of a rendering.

    Where a text stands more than once, its place reaches from the first to the last; that of a part of a tool call is
    the first. Where only its end is marked, its start is counted back if the text stands there unchanged.
    """
    text = alphabet.pattern.sub("", rendered)
    edges: dict[int, list[tuple[int, bool]]] = {}
    for count, found in enumerate(alphabet.pattern.finditer(rendered)):
        number, closes = divmod(ord(found[0]) - alphabet.first, 2)
        edges.setdefault(number, []).append((found.start() - count, bool(closes)))
    places = [_place(segments[number], positions, text) for number, positions in edges.items()]
    return Traced(text, tuple(segments), tuple(sorted(places, key=lambda place: (place.start, place.end))))


def _place(segment: Segment, edges: list[tuple[int, bool]], text: str) -> Place:
    again: tuple[int, ...] = ()
    closings = [number for number, (_, closes) in enumerate(edges) if closes]
    if segment.kind == "tool call" and len(closings) > 1:
        again = tuple(position for position, closes in edges[closings[0] + 1 :] if closes)
        edges = edges[: closings[0] + 1]
    start, end = edges[0][0], edges[-1][0]
    if start == end and text.endswith(segment.text, 0, end):
        start = end - len(segment.text)
    if text.endswith(segment.before, 0, start):
        start -= len(segment.before)
    if text.startswith(segment.after, end):
        end += len(segment.after)
    return Place(segment, start, end, again)
