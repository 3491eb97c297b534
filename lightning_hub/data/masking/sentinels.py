"""Wraps each message in two rare characters (sentinels), renders, and reads the positions back.

Every text of a conversation (contents, reasoning, tool names and arguments) is wrapped, and the conversation is
rendered again. If this rendering without its sentinels equals the plain rendering, the sentinels are exactly at the
edges of the texts, whatever the template does. If a sentinel is missing, the template dropped that text. Sentinels are
placed inside the white space around a text, so that a template that strips texts keeps them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from lightning_hub.data.conversation import BadExampleError, Conversation, Message, ToolCall
from lightning_hub.data.masking.chat_template import Turn

Kind: TypeAlias = Literal["text", "thoughts", "tool call", "tool definition"]

_INLINE_THOUGHTS = re.compile(r"(\s*(?:<think>)?)(.*?)(</think>)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TemplateDialect:
    """The form in which a template takes contents and arguments, found once by `template_profile`.

    Attributes:
        parts: Contents are lists of text parts.
        arguments_as_text: Tool-call arguments are JSON text.
    """

    parts: bool = False
    arguments_as_text: bool = False


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text between sentinels, and the white space left outside of them; ``turn`` is -1 for tool definitions."""

    turn: int
    kind: Kind
    text: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class TextSpan:
    """The position of a marked text in a rendering: from character ``load_and_shard`` up to, not including, ``end``.

    Attributes:
        again: Ends of further copies of a part of a tool call; some templates repeat the name in the tool's turn.
    """

    marked_text: MarkedText
    start: int
    end: int
    again: tuple[int, ...] = ()


def plain_turns(conversation: Conversation, dialect: TemplateDialect) -> list[Turn]:
    """The turns of a conversation whose messages have a role and a text only, without sentinels."""
    if dialect.parts:
        return [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in conversation.messages]
    return [{"role": m.role, "content": m.content} for m in conversation.messages]


@dataclass(frozen=True)
class SentinelBlock:
    """A block of rare, printable characters to use as sentinels: no template filter escapes or strips them."""

    first: int
    last: int

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches one sentinel."""
        return re.compile(f"[{chr(self.first)}-{chr(self.last)}]")


_BLOCKS = (SentinelBlock(0x20000, 0x2A6DF), SentinelBlock(0x17000, 0x187F7), SentinelBlock(0x12000, 0x12399))
"""CJK extension B, Tangut, cuneiform."""


def choose_block(text: str) -> SentinelBlock:
    """A block of which the text contains no character."""
    for block in _BLOCKS:
        if text.isascii() or not block.pattern.search(text):
            return block
    raise BadExampleError(
        "the text mixes rare Chinese, Tangut and cuneiform signs, and no block is left to find turns with"
    )


class SentinelInserter:
    """Makes template input from a conversation, with sentinels around each text or without.

    Args:
        dialect: The dialect of the template.
        block: The sentinels; None leaves the texts as they are.
        only_ends: Insert only the sentinel at the end of each text, for templates that read how a text begins.
    """

    def __init__(
        self, dialect: TemplateDialect, block: SentinelBlock | None = None, *, only_ends: bool = False
    ) -> None:
        self.dialect = dialect
        self.block = block
        self.only_ends = only_ends
        self.marked_texts: list[MarkedText] = []
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
        turn["content"] = [{"type": "text", "text": content}] if self.dialect.parts else content
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
            "arguments": json.dumps(marked, ensure_ascii=False) if self.dialect.arguments_as_text else marked,
        }

    def _value(self, value: object) -> object:
        if isinstance(value, str):
            return self._wrap(value, "tool call")
        if isinstance(value, dict):
            return {key: self._value(item) for key, item in value.items()}
        return [self._value(item) for item in value] if isinstance(value, list) else value

    def _tool(self, tool: Mapping[str, object]) -> Turn:
        function = tool.get("function")
        if self.block is None or not isinstance(function, dict):
            return dict(tool)
        key = "description" if isinstance(function.get("description"), str) else "name"
        return {**tool, "function": {**function, key: self._wrap(str(function.get(key, "")), "tool definition")}}

    def _wrap(self, text: str, kind: Kind) -> str:
        if self.block is None or not (core := text.strip()):
            return text
        opening = self.block.first + 2 * len(self.marked_texts)
        if opening + 1 > self.block.last:
            raise BadExampleError("the conversation has too many texts to find them all")
        start = text.index(core)
        end = start + len(core)
        self.marked_texts.append(MarkedText(self._turn, kind, core, text[:start], text[end:]))
        return text[:start] + ("" if self.only_ends else chr(opening)) + core + chr(opening + 1) + text[end:]


@dataclass(frozen=True)
class LocatedTexts:
    """A rendering whose texts have been found.

    Attributes:
        text: The rendering, without sentinels.
        marked_texts: All texts that were given to the template.
        spans: Those that are in the rendering, in its order.
    """

    text: str
    marked_texts: tuple[MarkedText, ...]
    spans: tuple[TextSpan, ...]

    def missing(self) -> list[MarkedText]:
        """Texts that are not in the rendering."""
        found = {id(span.marked_text) for span in self.spans}
        return [marked_text for marked_text in self.marked_texts if id(marked_text) not in found]

    def rewritten(self) -> list[MarkedText]:
        """Texts that the template changed; JSON escapes are not a change."""
        return [span.marked_text for span in self.spans if not _same(span, self.text)]

    def tail(self) -> str:
        """The rendering after the last text."""
        return self.text[max((span.end for span in self.spans), default=0) :]


def _same(span: TextSpan, text: str) -> bool:
    rendered, given = text[span.start : span.end].strip(), span.marked_text.text
    return rendered in (given, json.dumps(given, ensure_ascii=False)[1:-1])


def locate_texts(rendered: str, marked_texts: Sequence[MarkedText], block: SentinelBlock) -> LocatedTexts:
    """Read the positions of the sentinels in a rendering.

    If a text is rendered several times, its span is from the first copy to the last; for a part of a tool call it is
    the first copy. If only the end has a sentinel, the start is counted back, provided that the text is unchanged.
    """
    text = block.pattern.sub("", rendered)
    edges: dict[int, list[tuple[int, bool]]] = {}
    for count, found in enumerate(block.pattern.finditer(rendered)):
        number, closes = divmod(ord(found[0]) - block.first, 2)
        edges.setdefault(number, []).append((found.start() - count, bool(closes)))
    spans = [_span_of(marked_texts[number], positions, text) for number, positions in edges.items()]
    return LocatedTexts(text, tuple(marked_texts), tuple(sorted(spans, key=lambda span: (span.start, span.end))))


def _span_of(marked_text: MarkedText, edges: list[tuple[int, bool]], text: str) -> TextSpan:
    again: tuple[int, ...] = ()
    closings = [number for number, (_, closes) in enumerate(edges) if closes]
    if marked_text.kind == "tool call" and len(closings) > 1:
        again = tuple(position for position, closes in edges[closings[0] + 1 :] if closes)
        edges = edges[: closings[0] + 1]
    start, end = edges[0][0], edges[-1][0]
    if start == end and text.endswith(marked_text.text, 0, end):
        start = end - len(marked_text.text)
    if text.endswith(marked_text.before, 0, start):
        start -= len(marked_text.before)
    if text.startswith(marked_text.after, end):
        end += len(marked_text.after)
    return TextSpan(marked_text, start, end, again)
