"""Reads inputs row by row, encodes them in batches, and accounts for every row."""

from __future__ import annotations

import shutil
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lightning_hub.data.conversation import BadRowError, Example
from lightning_hub.data.encode import ROLES, Encoder, Refused, Sample
from lightning_hub.data.files import Row
from lightning_hub.data.formats import Layout, normalise, recognise, rename
from lightning_hub.data.report import SHOWN, DataReport, Reason
from lightning_hub.data.samples import IGNORED, Indices, Samples
from lightning_hub.data.settings import DataSettings
from lightning_hub.data.sources import Input
from lightning_hub.errors import DataError

BATCH = 512
"""Rows encoded at a time: enough to spread over threads, little memory."""

_REMEDIES: dict[str, str] = {
    "unreadable": "mend them, or leave them out with data.on_bad: skip",
    "refused": "mend them, or leave them out with data.on_bad: skip",
    "too long": "raise data.max_seq_len, or choose data.on_long: truncate or drop",
    "no trained token": "check data.train_on and the roles, or leave them out with data.on_bad: skip",
}


class RowsError(DataError):
    """Rows that cannot be used, listed by place."""

    def __init__(self, message: str, places: list[str], remedy: str) -> None:
        super().__init__(message, where=places[0].split(": ")[0], remedy=remedy)
        self.places = places

    def __str__(self) -> str:
        return "\n".join([f"{self.message}; {self.remedy}:", *(f"  {place}" for place in self.places)])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one row came to.

    Attributes:
        row: The row as read.
        layout: How its source is laid out.
        all_samples: Every sample that it gave, also those that are not kept.
        reason: Why the row is dropped, or None.
        detail: More about the reason.
        tokens_lost: Tokens that truncation cut off.
        max_seq_len: The longest sample that is kept.
    """

    row: Row
    layout: Layout | None
    all_samples: list[Sample]
    reason: Reason | None = None
    detail: str = ""
    tokens_lost: int = 0
    max_seq_len: int = 0

    @property
    def samples(self) -> list[Sample]:
        """The samples that are kept."""
        if self.reason:
            return []
        return [part for part in self.all_samples if part.num_trained and len(part.ids) <= self.max_seq_len]

    def reason_of(self, part: Sample | None) -> str | None:
        """Why a sample of this row is dropped, or None."""
        if self.reason:
            return f"{self.reason}: {self.detail}" if self.detail else self.reason
        if part is None or (part.num_trained and len(part.ids) <= self.max_seq_len):
            return None
        return "too long" if len(part.ids) > self.max_seq_len else "no trained token"


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Small batches first, while the encoder learns a template's habits from rows that it takes slowly."""
    for size in chain((16, 16, 32, 64, 128, 256), repeat(BATCH)):
        batch = list(islice(rows, size))
        if not batch:
            return
        yield batch


class RowReader:
    """Rows of one input to outcomes, in order.

    Args:
        settings: What rows must look like.
        encoder: Tokenises them.
    """

    def __init__(self, settings: DataSettings, encoder: Encoder) -> None:
        self.settings = settings
        self.encoder = encoder
        self.layout: Layout | None = None

    def outcomes(self, rows: Iterator[Row]) -> Iterator[Outcome]:
        """Encode rows batch by batch, several at a time; outcomes come in the order of the rows.

        Threads, not processes: the tokenizer works outside the interpreter's lock, and nothing has to be copied.

        Raises:
            DataError: The layout of the first row is not recognised.
        """
        pending: deque[tuple[list[Row], list[Example | Refused], Future[list[list[Sample] | Refused]]]] = deque()
        with ThreadPoolExecutor(self.settings.num_proc) as pool:
            for batch in _batches(rows):
                examples = [self._example(row) for row in batch]
                good = [example for example in examples if not isinstance(example, Refused)]
                pending.append((batch, examples, pool.submit(self.encoder.encode, good)))
                if len(pending) > self.settings.num_proc:
                    yield from self._finish(*pending.popleft())
            while pending:
                yield from self._finish(*pending.popleft())

    def _finish(
        self, batch: list[Row], examples: list[Example | Refused], encoding: Future[list[list[Sample] | Refused]]
    ) -> Iterator[Outcome]:
        encoded = iter(encoding.result())
        for row, example in zip(batch, examples, strict=True):
            yield self._outcome(row, example if isinstance(example, Refused) else next(encoded))

    def begin(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Recognise the layout by the first row; the rows come back whole."""
        first = next(rows, None)
        if first is None:
            return iter(())
        self._example(first)
        return chain([first], rows)

    @property
    def one_sample_per_row(self) -> bool:
        """Whether counting rows is counting samples."""
        return self.layout not in (None, "document") and not self.settings.expand_turns

    def _example(self, row: Row) -> Example | Refused:
        if row.problem:
            return Refused(row.problem)
        data = rename(row.data, self.settings.columns)
        if self.layout is None:
            self.layout = recognise(data, self.settings.format, row.where)
        try:
            return normalise(data, self.layout)
        except BadRowError as error:
            return Refused(str(error))
        except RecursionError:
            return Refused("nested too deeply")

    def _outcome(self, row: Row, encoded: list[Sample] | Refused) -> Outcome:
        if isinstance(encoded, Refused):
            return Outcome(row, self.layout, [], "unreadable" if row.problem else "refused", encoded.why)
        maximum = self.settings.max_seq_len
        longest = max(len(sample.ids) for sample in encoded)
        lost = 0
        if longest > maximum:
            if self.settings.on_long == "truncate":
                lost = sum(self._cut(sample) for sample in encoded)
            elif self.settings.on_long == "error" or all(len(sample.ids) > maximum for sample in encoded):
                detail = f"{longest} tokens, the maximum is {maximum}"
                return Outcome(row, self.layout, encoded, "too long", detail)
        outcome = Outcome(row, self.layout, encoded, tokens_lost=lost, max_seq_len=maximum)
        if outcome.samples:
            return outcome
        detail = "every trained token was cut off" if lost else ""
        return replace(outcome, reason="no trained token", detail=detail)

    def _cut(self, sample: Sample) -> int:
        """Cut a sample to the maximum; return how many tokens went."""
        size = self.settings.max_seq_len
        lost = len(sample.ids) - size
        if lost <= 0:
            return 0
        sample.ids, sample.labels = sample.ids[:size], sample.labels[:size]
        sample.num_trained = int((sample.labels != IGNORED).sum())
        sample.by_role = _fewer(sample.by_role, lost)
        return lost


def _fewer(by_role: list[int], lost: int) -> list[int]:
    """Take cut tokens from the roles that end samples: answers first."""
    left = list(by_role)
    for role in ("assistant", "tool", "user", *ROLES):
        taken = min(lost, left[ROLES.index(role)])
        left[ROLES.index(role)] -= taken
        lost -= taken
    return left


class Intake:
    """Collects the samples of all inputs of one side, training or validation.

    Args:
        settings: What rows must look like, and whether bad ones are errors.
        encoder: Tokenises them.
        spool: A folder for samples on their way; made, and removed by :meth:`close`.
    """

    def __init__(self, settings: DataSettings, encoder: Encoder, spool: Path) -> None:
        self.settings = settings
        self.encoder = encoder
        self.report = DataReport()
        self._folder = spool
        spool.mkdir(parents=True)
        self._ids: BinaryIO = (spool / "ids").open("wb")
        self._labels: BinaryIO = (spool / "labels").open("wb")
        self._lengths: list[int] = []
        self._trained: list[int] = []
        self._roles: list[list[int]] = []
        self._row_of_sample: list[int] = []
        self._places: list[str] = []
        self._sources: list[int] = []
        self._inputs = 0
        self._wrong: Counter[Reason] = Counter()

    def read(self, given: Input) -> None:
        """Take in all rows of one input.

        Raises:
            DataError: 20 rows are wrong in a way that the settings do not let pass.
        """
        self.report.inputs.update(given.digest())
        reader = RowReader(self.settings, self.encoder)
        for outcome in reader.outcomes(given.rows()):
            self._account(outcome)
        for name in given.digest():
            self.report.formats[name] = reader.layout or "empty"
        self._inputs += 1

    def _account(self, outcome: Outcome) -> None:
        self.report.rows_read += 1
        if outcome.tokens_lost:
            self.report.truncated += 1
            self.report.tokens_lost += outcome.tokens_lost
            self.report.note_place("truncated", outcome.row.where, f"{outcome.tokens_lost} tokens cut off")
        if outcome.reason:
            self.report.drop(outcome.reason, outcome.row.where, outcome.detail)
            self._refuse_if_strict(outcome.reason)
            return
        self.report.rows_kept += 1
        kept = outcome.samples
        for sample in kept:
            self._store(sample)
        if len(kept) < len(outcome.all_samples):
            self.report.notes["samples dropped from rows that were kept"] += len(outcome.all_samples) - len(kept)
        self._places.append(outcome.row.where)
        self._sources.append(self._inputs)

    def _refuse_if_strict(self, reason: Reason) -> None:
        bad = reason in ("unreadable", "refused") and self.settings.on_bad == "error"
        long = reason == "too long" and self.settings.on_long == "error"
        if bad or long:
            self._wrong[reason] += 1
            if self._wrong[reason] >= SHOWN:
                self._refuse(reason, f"{SHOWN} rows or more")

    def _refuse(self, reason: Reason, how_many: str) -> None:
        raise RowsError(f"{how_many} cannot be used ({reason})", self.report.places[reason], _REMEDIES[reason])

    def _store(self, sample: Sample) -> None:
        self._ids.write(sample.ids.data)
        self._labels.write(sample.labels.data)
        self._lengths.append(len(sample.ids))
        self._trained.append(sample.num_trained)
        self._roles.append(sample.by_role)
        self._row_of_sample.append(len(self._places))
        if sample.notes:
            self.report.notes.update(sample.notes)

    def finish(self) -> None:
        """Close the intake and judge it as a whole.

        Raises:
            DataError: Rows are wrong, too many have no trained token, or none is left.
        """
        self._ids.close()
        self._labels.close()
        for reason, count in self._wrong.items():
            self._refuse(reason, f"{count} row{'s' if count > 1 else ''}")
        masked = self.report.dropped["no trained token"]
        self.report.fully_masked = masked
        if masked > 0.01 * self.report.rows_read and self.settings.on_bad == "error":
            self._refuse("no trained token", f"{masked} of {self.report.rows_read} rows, more than 1 %,")
        if not self.report.rows_kept:
            why = (
                ", ".join(f"{count} {reason}" for reason, count in self.report.dropped.items()) or "the input is empty"
            )
            raise DataError(
                f"no row to train on: {why}", where=", ".join(self.report.inputs), remedy="check the path and the file"
            )
        samples = len(self._lengths)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(self._lengths, dtype=np.int64))])
        self._spooled = Samples(
            ids=np.memmap(self._folder / "ids", np.int32, mode="r"),
            labels=np.memmap(self._folder / "labels", np.int32, mode="r"),
            offsets=offsets,
            num_trained=np.array(self._trained, dtype=np.int32),
            fingerprint="",
        )
        self._first_sample = np.searchsorted(np.array(self._row_of_sample), np.arange(len(self._places) + 1))
        assert self._first_sample[-1] == samples, "every sample belongs to a kept row"

    @property
    def rows(self) -> Indices:
        """Numbers of all kept rows."""
        return np.arange(len(self._places), dtype=np.int64)

    def source_of(self, rows: Indices) -> Indices:
        """The number of the source of each row."""
        return np.array(self._sources, dtype=np.int64)[rows]

    def samples_of(self, rows: Indices) -> Indices:
        """The samples of these rows, row by row."""
        begins, counts = self._first_sample[rows], np.diff(self._first_sample)[rows]
        shift = np.repeat(begins - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        return (shift + np.arange(counts.sum())).astype(np.int64)

    def leave_out(self, rows: Indices) -> None:
        """Move kept rows to the dropped ones, because their source's weight is below 1."""
        for row in rows:
            self.report.drop("not chosen", self._places[row])
        self.report.rows_kept -= len(rows)

    def store(self, folder: Path, order: Indices, fingerprint: str, report: DataReport) -> dict[str, object]:
        """Write samples in this order and complete the report of them."""
        self._spooled.save(folder, order=order, fingerprint=fingerprint)
        totals = np.array(self._roles, dtype=np.int64)[order].sum(axis=0)
        by_role = Counter({role: int(count) for role, count in zip(ROLES, totals, strict=True) if count})
        report.count_stored(Samples.load(folder), by_role)
        return report.as_dict()

    def close(self) -> None:
        """Remove the spool."""
        shutil.rmtree(self._folder)
