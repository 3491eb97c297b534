"""The account of every example: kept, or dropped with the reason; and how many tokens are trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

import numpy as np

from lightning_hub.data.sample_store import SampleStore
from lightning_hub.errors import DataError

SHOWN = 20
"""The number of places that are listed for each reason."""

Reason: TypeAlias = Literal["unreadable", "refused", "too long", "no trained token", "not chosen"]

_REMEDIES: dict[Reason, str] = {
    "unreadable": "fix them, or leave them out with data.init_args.on_bad: skip",
    "refused": "fix them, or leave them out with data.init_args.on_bad: skip",
    "too long": "raise data.init_args.max_seq_len, or set data.init_args.on_long: truncate or drop",
    "no trained token": "check data.init_args.train_on and the roles, or leave them out with data.init_args.on_bad: "
    "skip",
}


@dataclass
class DataReport:
    """What happened to the examples of one split, training or validation.

    Always ``rows_read == rows_kept + sum of dropped``. The names of the fields are the keys of ``data_report.json``;
    in them, a row is an example.

    Attributes:
        rows_read: Examples of all inputs.
        rows_kept: Examples that gave at least one sample.
        dropped: Dropped examples, by reason.
        places: ``file:line`` and detail of the first examples of each reason, and of truncated ones.
        samples: Stored samples, repeats by weight included.
        truncated: Examples cut to ``max_seq_len``.
        tokens_lost: Tokens that truncation removed.
        fully_masked: Examples without a trained token.
        tokens: Stored tokens.
        trained_tokens: Those of them that are trained.
        tokens_by_role: Tokens of the texts of each role; ``template`` is everything between them.
        length_histogram: Samples by length; the key is the smallest power of two that holds them, 16 or more.
        set_aside: Kept examples that were moved to validation.
        notes: What templates dropped or added, by name.
        formats: The layout of each source.
        inputs: Content hashes of the inputs.
    """

    rows_read: int = 0
    rows_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    samples: int = 0
    truncated: int = 0
    tokens_lost: int = 0
    fully_masked: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    tokens_by_role: Counter[str] = field(default_factory=Counter)
    length_histogram: Counter[str] = field(default_factory=Counter)
    set_aside: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: Reason, where: str, detail: str = "") -> None:
        """Count an example that is left out."""
        self.dropped[reason] += 1
        self.note_place(reason, where, detail)

    def note_place(self, reason: str, where: str, detail: str = "") -> None:
        """List an example, if it is one of the first of its kind."""
        listed = self.places.setdefault(reason, [])
        if len(listed) < SHOWN:
            listed.append(f"{where}: {detail}" if detail else where)

    def count_stored(self, samples: SampleStore, by_role: Counter[str]) -> None:
        """Count the stored samples and tokens."""
        self.samples = len(samples)
        self.tokens = int(samples.offsets[-1])
        self.trained_tokens = int(samples.num_trained.sum())
        self.tokens_by_role = by_role
        sizes = np.maximum(16, 2 ** np.ceil(np.log2(np.maximum(samples.lengths, 1))).astype(np.int64))
        for size, count in zip(*np.unique(sizes, return_counts=True), strict=True):
            self.length_histogram[str(size)] = int(count)

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, object]:
        """The content of ``data_report.json``."""
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        plain = {name: dict(value) if isinstance(value, Counter) else value for name, value in columns.items()}
        return plain | {"trained_share": self.trained_share}

    @classmethod
    def from_dict(cls, stored: dict[str, object]) -> DataReport:
        """Read what :meth:`as_dict` gave."""
        known = {key: value for key, value in stored.items() if key in cls.__dataclass_fields__}
        report = cls(**known)  # type: ignore[arg-type]
        for key in ("dropped", "tokens_by_role", "length_histogram", "notes"):
            setattr(report, key, Counter(getattr(report, key)))
        return report


class BadExamplesError(DataError):
    """Examples that cannot be used, listed by place."""

    def __init__(self, reason: Reason, how_many: str, report: DataReport) -> None:
        places = report.places[reason]
        message = f"{how_many} cannot be used ({reason})"
        super().__init__(message, where=places[0].split(": ")[0], remedy=_REMEDIES[reason])
        self.places = places

    def __str__(self) -> str:
        return "\n".join([f"{self.message}; {self.remedy}:", *(f"  {place}" for place in self.places)])
