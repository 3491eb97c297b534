"""Brings the examples of every layout into the normal form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from lightning_hub.data.conversation import BadExampleError, Conversation, Document, Example, Message
from lightning_hub.data.readers import token_rows
from lightning_hub.data.readers.layouts import Fields, Layout
from lightning_hub.data.readers.messages import is_empty, parse_message

_COLUMNS: dict[Layout, frozenset[str]] = {
    "messages": frozenset(("messages", "conversations", "tools", "system", "unmask")),
    "sharegpt": frozenset(("messages", "conversations", "tools", "system", "unmask")),
    "alpaca": frozenset(("instruction", "input", "output", "history", "system", "tools", "unmask")),
    "prompt_completion": frozenset(("prompt", "completion", "system", "tools", "unmask")),
    "document": frozenset(("text", "document")),
    "tokens": token_rows.COLUMNS - {"special_tokens_mask"},
}
"""The columns of each layout that are read."""


def rename(fields: dict[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """Give the columns of the input our names; another column with the same name gets a longer one."""
    if not columns:
        return fields
    renamed = {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}
    taken = set(columns.values())
    others = {key: value for key, value in fields.items() if key not in taken}
    return {f"{key} (of the input)" if key in renamed else key: value for key, value in others.items()} | renamed


def normalise(fields: Fields, layout: Layout) -> Example:
    """Bring one example into the normal form.

    Raises:
        BadExampleError: The example does not have the form of its layout.
    """
    example = _NORMALISERS[layout](fields)
    if fields.keys() <= _COLUMNS[layout]:
        return example
    unread = [
        f"column {name} is not read" for name in fields if name not in _COLUMNS[layout] and fields[name] not in _NOTHING
    ]
    return replace(example, remarks=(*example.remarks, *unread)) if unread else example


_NOTHING: tuple[object, ...] = (None, "", [], {})


def _chat(fields: Fields) -> Conversation:
    column = "messages" if fields.get("messages") is not None or "conversations" not in fields else "conversations"
    turns = _json_list(fields.get(column), column)
    remarks: list[str] = []
    messages = tuple(parse_message(turn, f"{column}[{index}]", remarks) for index, turn in enumerate(turns))
    if column == "messages" and fields.get("conversations") not in _NOTHING:
        remarks.append("column conversations is not read")
    return _conversation(fields, _system(fields) + messages, remarks=remarks)


def _conversation(
    fields: Fields, messages: tuple[Message, ...], completion_from: int | None = None, remarks: Sequence[str] = ()
) -> Conversation:
    if not messages:
        raise BadExampleError("the conversation is empty")
    unmask = fields.get("unmask")
    if unmask is not None and not isinstance(unmask, bool):
        raise BadExampleError(f"unmask must be true or false, not {unmask!r}")
    empty = [message for message in messages if message.role == "assistant" and is_empty(message)]
    others = [message for message in messages if message.role != "assistant" and message.train and not unmask]
    remarks = (*remarks, *["train on a turn that is not the assistant's is not read"] * len(others))
    return Conversation(
        messages, _tools(fields), bool(unmask), completion_from, (*remarks, *["empty answers"] * len(empty))
    )


def _system(fields: Fields) -> tuple[Message, ...]:
    system = fields.get("system")
    if system is None or system == "":
        return ()
    return (Message("system", _text(system, "system")),)


def _tools(fields: Fields) -> tuple[Mapping[str, object], ...]:
    given = fields.get("tools")
    if given is None or given == "":
        return ()
    return tuple(_tool(tool) for tool in _json_list(given, "tools"))


def _tool(tool: object) -> Mapping[str, object]:
    if not isinstance(tool, dict):
        raise BadExampleError("each of tools must be an object")
    return tool if "function" in tool else {"type": "function", "function": tool}


def _alpaca(fields: Fields) -> Conversation:
    instruction, extra = _text(fields.get("instruction"), "instruction"), fields.get("input")
    question = f"{instruction}\n\n{_text(extra, 'input')}" if extra else instruction
    turns = (Message("user", question), Message("assistant", _text(fields.get("output"), "output")))
    return _conversation(fields, _system(fields) + _history(fields.get("history")) + turns)


def _history(value: object) -> tuple[Message, ...]:
    """Earlier rounds: pairs of a question and its answer."""
    if value is None or value == "":
        return ()
    rounds: list[Message] = []
    for index, pair in enumerate(_json_list(value, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadExampleError(f"history[{index}] must be a question with its answer, a list of two texts")
        question, answer = (_text(text, f"history[{index}]") for text in pair)
        rounds += [Message("user", question), Message("assistant", answer)]
    return tuple(rounds)


def _prompt_completion(fields: Fields) -> Conversation:
    remarks: list[str] = []
    prompt = _system(fields) + _turns(fields.get("prompt"), "prompt", "user", remarks)
    completion = _turns(fields.get("completion"), "completion", "assistant", remarks)
    return _conversation(fields, prompt + completion, completion_from=len(prompt), remarks=remarks)


def _turns(value: object, column: str, role: Literal["user", "assistant"], remarks: list[str]) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message(role, value),)
    if value is None:
        raise BadExampleError(f"{column} must be a text or a list of turns, not null or missing")
    return tuple(parse_message(turn, f"{column}[{index}]", remarks) for index, turn in enumerate(_list(value, column)))


def _document(fields: Fields) -> Document:
    text = _text(fields.get("text") if fields.get("text") is not None else fields.get("document"), "text")
    both = fields.get("text") is not None and fields.get("document") not in (None, "", fields.get("text"))
    if not text.strip():
        raise BadExampleError("the document is empty")
    return Document(text, ("column document is not read",) * both)


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise BadExampleError(f"{column} must be a text, not {_kind(value)}")
    return value


def _list(value: object, column: str) -> list[object]:
    if not isinstance(value, list):
        raise BadExampleError(f"{column} must be a list, not {_kind(value)}")
    return value


def _json_list(value: object, column: str) -> list[object]:
    """A list, or the JSON text of one, as CSV files and ShareGPT's ``tools`` have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadExampleError(f"{column} is a text that is not JSON") from error
    return _list(value, column)


def _kind(value: object) -> str:
    return "null or missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


_NORMALISERS: dict[Layout, Callable[[Fields], Example]] = {
    "messages": _chat,
    "sharegpt": _chat,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "document": _document,
    "tokens": token_rows.parse_tokens,
}
