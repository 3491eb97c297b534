"""Recognises the layout of a source from the columns of its first examples."""

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
"""Pairs of other names with one meaning only: our names to theirs; the first two are required."""


@dataclass(frozen=True)
class Recognised:
    """The layout of a source.

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


def recognise(fields: Fields, wanted: Format, where: str) -> Recognised:
    """Recognise the layout of a source from one example.

    Columns with a value count first; then columns that are null count too.

    Raises:
        DataError: No layout fits; lists the columns and the options that help.
    """
    if wanted != "auto":
        return Recognised(wanted, _other_names(fields, wanted))
    filled = {name for name, value in fields.items() if value is not None}
    for present in (filled, set(fields)):
        for layout, columns in _SIGNATURES:
            if present.issuperset(columns):
                return Recognised(layout)
        for layout, pair in _PAIRS:
            if present.issuperset(list(pair.values())[:2]):
                return Recognised(layout, _used(pair, fields))
    names = ", ".join(sorted(map(str, fields))) or "none"
    raise DataError(
        f"the format is not recognised; columns present: {names}",
        where=where,
        remedy="map them with data.init_args.columns, such as {prompt: question, completion: answer} or "
        "{messages: dialog} or {text: body}, or name the layout with data.init_args.format",
    )


def _other_names(fields: Fields, wanted: Layout) -> Mapping[str, str]:
    """The names of a known pair, if the layout is given and its own names are missing."""
    own = next(columns for layout, columns in _SIGNATURES if layout == wanted)
    if any(name in fields for name in own[-1:]):
        return {}
    pairs = (pair for layout, pair in _PAIRS if layout == wanted and set(fields).issuperset(list(pair.values())[:2]))
    return _used(next(pairs, {}), fields)


def _used(pair: Mapping[str, str], fields: Fields) -> Mapping[str, str]:
    """The part of a pair that renames a column; a column that has our name stays."""
    return {ours: theirs for ours, theirs in pair.items() if ours != theirs and ours not in fields}
