"""Rows of every known layout to the normal form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias, cast

from lightning_hub.data.conversation import BadRowError, Conversation, Document, Example, Message, Tokens
from lightning_hub.data.messages import parse_message
from lightning_hub.data.settings import Format
from lightning_hub.errors import DataError
from lightning_hub.ops.rows import IGNORED

Fields: TypeAlias = Mapping[str, object]
Layout: TypeAlias = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "document", "tokens"]


def rename(row: dict[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """Give the input's columns our names; other columns stay."""
    if not columns:
        return row
    renamed = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    taken = set(columns.values())
    return {key: value for key, value in row.items() if key not in taken} | renamed


def recognise(row: Fields, wanted: Format, where: str) -> Layout:
    """Tell the layout of a source by its first row.

    Raises:
        DataError: No layout fits; lists the columns and the ways out.
    """
    if wanted != "auto":
        return wanted
    for layout, columns in _SIGNATURES:
        if all(row.get(column) is not None for column in columns):
            return layout
    present = ", ".join(sorted(map(str, row))) or "none"
    raise DataError(
        f"the format is not recognised; columns present: {present}",
        where=where,
        remedy="map them with data.columns, such as {prompt: question, completion: answer} or {messages: dialog} or "
        "{text: body}, or name the layout with data.format",
    )


def normalise(row: Fields, layout: Layout) -> Example:
    """Bring one row into the normal form.

    Raises:
        BadRowError: The row does not have the shape of its layout.
    """
    return _NORMALISERS[layout](row)


def _chat(row: Fields) -> Conversation:
    column = "messages" if row.get("messages") is not None else "conversations"
    turns = _json_list(row.get(column), column)
    messages = _system(row) + tuple(parse_message(turn, f"{column}[{index}]") for index, turn in enumerate(turns))
    return _conversation(row, messages)


def _conversation(row: Fields, messages: tuple[Message, ...], completion_from: int | None = None) -> Conversation:
    if not messages:
        raise BadRowError("the conversation is empty")
    unmask = row.get("unmask")
    if unmask is not None and not isinstance(unmask, bool):
        raise BadRowError(f"unmask must be true or false, not {unmask!r}")
    return Conversation(messages, _tools(row), bool(unmask), completion_from)


def _system(row: Fields) -> tuple[Message, ...]:
    system = row.get("system")
    if system is None or system == "":
        return ()
    return (Message("system", _text(system, "system")),)


def _tools(row: Fields) -> tuple[Mapping[str, object], ...]:
    given = row.get("tools")
    if given is None or given == "":
        return ()
    return tuple(_tool(tool) for tool in _json_list(given, "tools"))


def _tool(tool: object) -> Mapping[str, object]:
    if not isinstance(tool, dict):
        raise BadRowError("each of tools must be an object")
    tool = _without_nulls(tool)
    return tool if "function" in tool else {"type": "function", "function": tool}


def _without_nulls(tool: dict[str, object]) -> dict[str, object]:
    """Columnar files give every tool the keys of all others, with null where a tool has none."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in tool.items()
        if value is not None
    }


def _alpaca(row: Fields) -> Conversation:
    instruction, extra = _text(row.get("instruction"), "instruction"), row.get("input")
    question = f"{instruction}\n\n{_text(extra, 'input')}" if extra else instruction
    turns = (Message("user", question), Message("assistant", _text(row.get("output"), "output")))
    return _conversation(row, _system(row) + turns)


def _prompt_completion(row: Fields) -> Conversation:
    prompt = _system(row) + _turns(row.get("prompt"), "prompt", "user")
    completion = _turns(row.get("completion"), "completion", "assistant")
    return _conversation(row, prompt + completion, completion_from=len(prompt))


def _turns(value: object, column: str, role: Literal["user", "assistant"]) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message(role, value),)
    return tuple(parse_message(turn, f"{column}[{index}]") for index, turn in enumerate(_list(value, column)))


def _document(row: Fields) -> Document:
    text = _text(row.get("text") if row.get("text") is not None else row.get("document"), "text")
    if not text.strip():
        raise BadRowError("the document is empty")
    return Document(text)


def _tokens(row: Fields) -> Tokens:
    ids = _integers(row.get("input_ids"), "input_ids")
    labels = ids if row.get("labels") is None else _integers(row["labels"], "labels")
    if not ids:
        raise BadRowError("input_ids is empty")
    if len(ids) != len(labels):
        raise BadRowError(f"{len(ids)} input_ids but {len(labels)} labels")
    if any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)):
        raise BadRowError(f"each label must be {IGNORED} or the token at its own place (labels are not shifted)")
    return Tokens(ids, labels)


def _integers(value: object, column: str) -> tuple[int, ...]:
    numbers = _list(value, column)
    if not all(type(number) is int for number in numbers):
        raise BadRowError(f"{column} must hold whole numbers only")
    return tuple(cast(Iterable[int], numbers))


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{column} must be a text, not {_kind(value)}")
    return value


def _list(value: object, column: str) -> list[object]:
    if not isinstance(value, list):
        raise BadRowError(f"{column} must be a list, not {_kind(value)}")
    return value


def _json_list(value: object, column: str) -> list[object]:
    """A list, or the JSON text of one, as CSV files and ShareGPT's ``tools`` have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"{column} is a text that is not JSON") from error
    return _list(value, column)


def _kind(value: object) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


_SIGNATURES: tuple[tuple[Layout, tuple[str, ...]], ...] = (
    ("tokens", ("input_ids",)),
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("prompt_completion", ("prompt", "completion")),
    ("alpaca", ("instruction", "output")),
    ("document", ("text",)),
    ("document", ("document",)),
)

_NORMALISERS: dict[Layout, Callable[[Fields], Example]] = {
    "messages": _chat,
    "sharegpt": _chat,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "document": _document,
    "tokens": _tokens,
}
