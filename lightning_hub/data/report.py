"""The account of every row read: what was kept, what was not and why, and how many tokens are trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

import numpy as np

from lightning_hub.data.sample_store import SampleStore

SHOWN = 20
"""How many places of each reason are listed."""

Reason: TypeAlias = Literal["unreadable", "refused", "too long", "no trained token", "not chosen"]


@dataclass
class DataReport:
    """What became of the rows of one side, training or validation.

    Always ``rows_read == rows_kept + sum of dropped``.

    Attributes:
        rows_read: Rows of all inputs.
        rows_kept: Rows that gave at least one sample.
        dropped: Rows left out, by reason.
        places: ``file:line`` and detail of the first rows of each reason, and of truncated ones.
        samples: SampleStore stored, repeats by weight included.
        truncated: Rows cut to ``max_seq_len``.
        tokens_lost: Tokens cut off.
        fully_masked: Rows in which no token is trained.
        tokens: Stored tokens.
        trained_tokens: Those of them that are trained.
        tokens_by_role: Tokens of the texts of each role; ``template`` is everything between them.
        length_histogram: SampleStore by length; the key is the smallest power of two that holds them, 16 or more.
        set_aside: Kept rows that went to validation.
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
        """Account for a row that is left out."""
        self.dropped[reason] += 1
        self.note_place(reason, where, detail)

    def note_place(self, reason: str, where: str, detail: str = "") -> None:
        """List a row among the first of its kind."""
        listed = self.places.setdefault(reason, [])
        if len(listed) < SHOWN:
            listed.append(f"{where}: {detail}" if detail else where)

    def count_stored(self, samples: SampleStore, by_role: Counter[str]) -> None:
        """Account for what ended up in the store."""
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
