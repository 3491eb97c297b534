"""The normal form: every layout is brought into it before a template renders it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that an assistant turn makes; its arguments are always an object, never JSON text."""

    name: str
    arguments: Mapping[str, object]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: Who speaks.
        content: The text, "" where there is none.
        reasoning: Reasoning given next to the content (``reasoning_content`` or a reasoning part).
        tool_calls: The calls of an assistant turn.
        name: The speaker's or the tool's name, if the example gives one.
        tool_call_id: The call that a tool turn answers.
        train: Whether the turn is trained, if the example itself says so; None leaves it to ``train_on``.
    """

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    train: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one sample.

    Attributes:
        messages: The turns in order.
        tools: Tool definitions offered to the model, in the shape that templates expect.
        unmask: Train on everything but the system text (the example's own ``unmask: true``).
        completion_from: Index of the first turn that belongs to the completion; None if the example does not say.
        remarks: What a person should know about this example, one entry each time: unread parts, empty answers.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    unmask: bool = False
    completion_from: int | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text for continued pretraining: every token is trained."""

    text: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """An example that was tokenised elsewhere."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    remarks: tuple[str, ...] = ()


Example: TypeAlias = Conversation | Document | Tokens


@dataclass(frozen=True, slots=True)
class Refused:
    """An example that gives no sample."""

    why: str


class BadExampleError(ValueError):
    """An example that cannot be used; the message says why, without the place."""
