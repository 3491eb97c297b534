"""Which layout a source has, told by the columns of its first rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lightning_hub.data.settings import Format
from lightning_hub.errors import DataError

Fields: TypeAlias = Mapping[str, object]
Layout: TypeAlias = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "document", "tokens"]

_SIGNATURES: tuple[tuple[Layout, tuple[str, ...]], ...] = (
    ("tokens", ("input_ids",)),
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("prompt_completion", ("prompt", "completion")),
    ("alpaca", ("instruction", "output")),
    ("document", ("text",)),
    ("document", ("document",)),
)

_PAIRS: tuple[tuple[Layout, dict[str, str]], ...] = (
    ("alpaca", {"instruction": "instruction", "output": "response", "input": "context"}),
    ("alpaca", {"instruction": "instruction", "output": "completion"}),
    ("alpaca", {"instruction": "instruction", "output": "answer"}),
    ("alpaca", {"instruction": "query", "output": "response"}),
    ("alpaca", {"instruction": "query", "output": "answer"}),
    ("prompt_completion", {"prompt": "question", "completion": "answer"}),
    ("prompt_completion", {"prompt": "question", "completion": "response"}),
    ("prompt_completion", {"prompt": "prompt", "completion": "response"}),
    ("prompt_completion", {"prompt": "prompt", "completion": "answer"}),
    ("prompt_completion", {"prompt": "prompt", "completion": "output"}),
    ("prompt_completion", {"prompt": "problem", "completion": "solution"}),
    ("prompt_completion", {"prompt": "input", "completion": "output"}),
    ("prompt_completion", {"prompt": "inputs", "completion": "targets"}),
    ("prompt_completion", {"prompt": "user", "completion": "assistant"}),
)
"""Pairs of other names that mean one thing only: our names to theirs, the first two required."""


@dataclass(frozen=True)
class Recognised:
    """How the rows of a source are laid out.

    Attributes:
        layout: The layout.
        columns: Our names to those of the source, where these are others.
    """

    layout: Layout
    columns: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The layout in words."""
        names = [f"{ours}: {theirs}" for ours, theirs in self.columns.items() if ours != theirs]
        return f"{self.layout} ({', '.join(names)})" if names else self.layout


def recognise(row: Fields, wanted: Format, where: str) -> Recognised:
    """Tell the layout of a source by one of its rows.

    Columns with a value count first; a column that is there and null is still its layout's.

    Raises:
        DataError: No layout fits; lists the columns and the ways out.
    """
    if wanted != "auto":
        return Recognised(wanted, _other_names(row, wanted))
    filled = {name for name, value in row.items() if value is not None}
    for present in (filled, set(row)):
        for layout, columns in _SIGNATURES:
            if present.issuperset(columns):
                return Recognised(layout)
        for layout, pair in _PAIRS:
            if present.issuperset(list(pair.values())[:2]):
                return Recognised(layout, _used(pair, row))
    names = ", ".join(sorted(map(str, row))) or "none"
    raise DataError(
        f"the format is not recognised; columns present: {names}",
        where=where,
        remedy="map them with data.columns, such as {prompt: question, completion: answer} or {messages: dialog} or "
        "{text: body}, or name the layout with data.format",
    )


def _other_names(row: Fields, wanted: Layout) -> Mapping[str, str]:
    """The other names of a pair that is wanted by name, where its own are not there."""
    own = next(columns for layout, columns in _SIGNATURES if layout == wanted)
    if any(name in row for name in own[-1:]):
        return {}
    pairs = (pair for layout, pair in _PAIRS if layout == wanted and set(row).issuperset(list(pair.values())[:2]))
    return _used(next(pairs, {}), row)


def _used(pair: Mapping[str, str], row: Fields) -> Mapping[str, str]:
    """The part of a pair that renames something: an own name that is there stays."""
    return {ours: theirs for ours, theirs in pair.items() if ours != theirs and ours not in row}
