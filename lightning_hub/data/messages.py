"""One turn in any of the common spellings to a :class:`Message`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from lightning_hub.data.conversation import BadRowError, Message, Role, ToolCall

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")


def parse_message(turn: object, place: str) -> Message:
    """Read one turn.

    Args:
        turn: An object with ``role`` and ``content``, or ``from`` and ``value``.
        place: How a refusal names it, such as ``messages[2]``.

    Raises:
        BadRowError: It has no such shape.
    """
    if not isinstance(turn, dict):
        raise BadRowError(f"{place} must be an object, not {type(turn).__name__}")
    spoken = turn.get("role", turn.get("from"))
    role = _ROLES.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        raise BadRowError(f"{place} has the role {spoken!r}; known are {', '.join(_ROLES)}")
    value = turn.get("content", turn.get("value"))
    if spoken == "function_call":
        return Message(role, "", tool_calls=_calls(value, place), train=_train_flag(turn, place))
    content, thoughts = (value, "") if isinstance(value, str) else _parts(value, place)
    if len(turn) == 2 and value is not None:
        return Message(role, content, thoughts)
    return _full_message(turn, role, content, thoughts, place)


def _full_message(turn: Mapping[str, object], role: Role, content: str, thoughts: str, place: str) -> Message:
    calls = turn.get("tool_calls")
    return Message(
        role,
        content,
        reasoning=_reasoning(turn, place) or thoughts,
        tool_calls=_calls(calls, place) if calls else (),
        name=_optional_text(turn, "name", place),
        tool_call_id=_optional_text(turn, "tool_call_id", place),
        train=_train_flag(turn, place),
    )


def _parts(value: object, place: str) -> tuple[str, str]:
    """The text and the thoughts of a content that is absent or a list of parts."""
    if value is None:
        return "", ""
    if not isinstance(value, list):
        raise BadRowError(f"{place} has a content that is neither text nor a list of parts")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in _TEXT_PARTS:
            texts.append(_part_text(part, ("text",), place))
        elif kind in _REASONING_PARTS:
            thoughts.append(_part_text(part, ("text", *_REASONING_PARTS), place))
        else:
            raise BadRowError(f"{place} has a part of type {kind!r}; a text model takes text and reasoning")
    return "".join(texts), "".join(thoughts)


def _part_text(part: Mapping[str, object], keys: tuple[str, ...], place: str) -> str:
    for key in keys:
        text = part.get(key)
        if isinstance(text, str):
            return text
    raise BadRowError(f"{place} has a part without text")


def _reasoning(turn: Mapping[str, object], place: str) -> str:
    for key in _REASONING_KEYS:
        if turn.get(key) is not None:
            return _optional_text(turn, key, place) or ""
    return ""


def _optional_text(turn: Mapping[str, object], key: str, place: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRowError(f"{place}.{key} must be a text, not {type(value).__name__}")
    return value


def _train_flag(turn: Mapping[str, object], place: str) -> bool | None:
    for key in ("train", "weight"):
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise BadRowError(f"{place}.{key} is {value!r}; a turn is trained (1, true) or not (0, false)")
        return bool(value)
    return None


def _calls(value: object, place: str) -> tuple[ToolCall, ...]:
    """Calls as a list, one call, or the JSON text of either."""
    if isinstance(value, str):
        value = _load(value, f"{place}'s call")
    calls = value if isinstance(value, list) else [value]
    return tuple(_call(call, place) for call in calls)


def _call(call: object, place: str) -> ToolCall:
    inner = call.get("function", call) if isinstance(call, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRowError(f"{place} has a tool call without a name")
    arguments = cast(dict[str, object], inner).get("arguments")
    if isinstance(arguments, str) and arguments:
        arguments = _load(arguments, f"the arguments of {name} in {place}")
    if not arguments:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadRowError(f"{place} calls {name} with arguments that are no object")
    identity = cast(dict[str, object], call).get("id")
    return ToolCall(name, arguments, identity if isinstance(identity, str) else None)


def _load(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{what}: not JSON") from error
