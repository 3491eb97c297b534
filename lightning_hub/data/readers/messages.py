"""Reads one turn, in any of the common spellings, as a :class:`Message`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lightning_hub.data.conversation import BadExampleError, Message, Role, ToolCall

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
_WEIGHTS = ("train", "weight", "loss_weight")
_KEYS = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", "name", "tool_call_id", *_WEIGHTS)
)
"""Keys of a turn that are read whatever else there is; of the reasoning keys one is."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")
_ARGUMENTS = ("arguments", "parameters")
_NOTHING: tuple[object, ...] = (None, "", [], {})


def parse_message(turn: object, place: str, remarks: list[str] | None = None) -> Message:
    """Read one turn.

    Args:
        turn: An object with ``role`` and ``content``, or ``from`` and ``value``.
        place: Its name in errors, such as ``messages[2]``.
        remarks: Where to note keys that are not read.

    Raises:
        BadExampleError: It does not have this form.
    """
    if not isinstance(turn, dict):
        raise BadExampleError(f"{place} must be an object, not {type(turn).__name__}")
    spoken = turn.get("role")
    if spoken is None:
        spoken = turn.get("from")
    role = _ROLES.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        raise BadExampleError(f"{place} has the role {spoken!r}; known are {', '.join(_ROLES)}")
    value = turn.get("content")
    if value is None:
        value = turn.get("value")
    if len(turn) == 2 and isinstance(value, str) and spoken != "function_call":
        return Message(role, value)
    return _full_message(turn, role, value, place, [] if remarks is None else remarks)


def is_empty(message: Message) -> bool:
    """Whether a turn says nothing at all."""
    return not (message.content or message.reasoning or message.tool_calls)


def _full_message(turn: Mapping[str, object], role: Role, value: object, place: str, remarks: list[str]) -> Message:
    parts = _Parts(place, remarks)
    calls: tuple[ToolCall, ...] = ()
    if "function_call" in (turn.get("role"), turn.get("from")):
        calls = _calls(value, place, remarks)
    elif isinstance(value, str):
        parts.text = value
    elif isinstance(value, list):
        parts.read(value)
    elif value is not None:
        raise BadExampleError(f"{place} has a content that is neither text nor a list of parts")
    reasoning = _reasoning(turn, place)
    calls += tuple(parts.calls) + _given_calls(turn, place, remarks)
    if value is None and not calls and not reasoning:
        key = "value" if "from" in turn and "role" not in turn else "content"
        given = "null" if key in turn else "missing"
        raise BadExampleError(f'{place}.{key} is {given}; write the text, "" for none')
    if calls and role != "assistant":
        raise BadExampleError(f"{place} has tool calls, but the role {role}; only assistant turns call tools")
    _note_unread(turn, reasoning, parts.thoughts, remarks)
    return Message(
        role,
        parts.text,
        reasoning=reasoning or parts.thoughts,
        tool_calls=calls,
        name=_optional_text(turn, "name", place),
        tool_call_id=_optional_text(turn, "tool_call_id", place),
        train=_train_flag(turn, place),
    )


def _note_unread(turn: Mapping[str, object], reasoning: str, thoughts: str, remarks: list[str]) -> None:
    """Note the keys of a turn that are not read."""
    used = next((key for key in _REASONING_KEYS if turn.get(key) is not None), None)
    unread = [key for key, value in turn.items() if key not in _KEYS and key != used and value not in _NOTHING]
    unread = [key for key in unread if key not in _REASONING_KEYS or turn[key] != turn.get(used or "")]
    for first, second in (("role", "from"), ("content", "value")):
        if turn.get(first) is not None and turn.get(second) not in (None, turn[first]):
            unread.append(second)
    remarks += [f"key {key} of a turn is not read" for key in unread]
    if reasoning and thoughts and thoughts != reasoning:
        remarks.append("reasoning part beside a reasoning key is not read")


class _Parts:
    """The parts of a content that is a list: texts, reasoning and tool calls."""

    def __init__(self, place: str, remarks: list[str]) -> None:
        self.place = place
        self.remarks = remarks
        self.text = ""
        self.thoughts = ""
        self.calls: list[ToolCall] = []

    def read(self, value: list[object]) -> None:
        """Take in all parts."""
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(part, dict) or not isinstance(kind, str):
                raise BadExampleError(
                    f"{self.place} has a part of type {kind!r}; a text model takes text and reasoning"
                )
            if kind in _TEXT_PARTS:
                text = self._said(part, ("text", "value"))
                if text.strip() and self.calls:
                    raise BadExampleError(f"{self.place} has a text after its tool call; templates write calls last")
                self.text += text
            elif kind in _REASONING_PARTS:
                self.thoughts += self._said(part, ("text", "value", *_REASONING_PARTS))
            elif kind == "tool_call":
                call = next((part[key] for key in ("value", "tool_call", "function") if part.get(key)), None)
                self.calls.extend(_calls(call, self.place, self.remarks))
            else:
                raise BadExampleError(
                    f"{self.place} has a part of type {kind!r}; a text model takes text and reasoning"
                )

    def _said(self, part: Mapping[str, object], keys: tuple[str, ...]) -> str:
        for key in keys:
            text = part.get(key)
            if isinstance(text, str):
                unread = [other for other in part if other not in ("type", key) and part[other] not in _NOTHING]
                self.remarks += [f"key {other} of a part is not read" for other in unread]
                return text
        raise BadExampleError(f"{self.place} has a part without text")


def _given_calls(turn: Mapping[str, object], place: str, remarks: list[str]) -> tuple[ToolCall, ...]:
    """The calls of ``tool_calls``, or of ``function_call``, their older name."""
    calls = turn.get("tool_calls") or turn.get("function_call")
    return _calls(calls, place, remarks) if calls else ()


def _reasoning(turn: Mapping[str, object], place: str) -> str:
    for key in _REASONING_KEYS:
        if turn.get(key) is not None:
            return _optional_text(turn, key, place) or ""
    return ""


def _optional_text(turn: Mapping[str, object], key: str, place: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise BadExampleError(f"{place}.{key} must be a text, not {type(value).__name__}")
    return value


def _train_flag(turn: Mapping[str, object], place: str) -> bool | None:
    flag: bool | None = None
    for key in _WEIGHTS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadExampleError(f"{place}.{key} is {value!r}; a turn is trained (1, true) or not (0, false)")
        if flag not in (None, bool(value)):
            raise BadExampleError(f"{place}.{key} is {value!r}, which another key of the turn contradicts")
        flag = bool(value)
    return flag


def _calls(value: object, place: str, remarks: list[str]) -> tuple[ToolCall, ...]:
    """Calls as a list, one call, or the JSON text of either."""
    if isinstance(value, str):
        value = _load(value, f"{place}'s call")
    calls = value if isinstance(value, list) else [value]
    return tuple(_call(call, place, remarks) for call in calls)


def _call(call: object, place: str, remarks: list[str]) -> ToolCall:
    outer = call if isinstance(call, dict) else {}
    inner = outer.get("function", outer)
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not name:
        raise BadExampleError(f"{place} has a tool call without a name")
    key = next((key for key in _ARGUMENTS if inner.get(key) is not None), _ARGUMENTS[0])
    arguments = inner.get(key)
    if isinstance(arguments, str) and arguments:
        arguments = _load(arguments, f"the arguments of {name} in {place}")
    if arguments in _NOTHING:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadExampleError(f"{place} calls {name} with arguments that are not an object")
    identity = outer.get("id")
    identity = str(identity) if isinstance(identity, int) else identity
    unread = {**outer, **inner}.keys() - {"id", "type", "function", "name", "index", key}
    remarks += [
        f"key {other} of a tool call is not read"
        for other in sorted(map(str, unread))
        if (inner.get(other) if other in inner else outer.get(other)) not in _NOTHING
    ]
    return ToolCall(name, arguments, identity if isinstance(identity, str) else None)


def _load(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadExampleError(f"{what}: not JSON") from error
