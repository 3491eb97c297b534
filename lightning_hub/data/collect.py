"""Takes in inputs row by row, and accounts for every row."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lightning_hub.data.encode import ROLES, Encoder, Sample
from lightning_hub.data.masking.dropped_text import CHARACTERS
from lightning_hub.data.outcomes import EncodedExample, ExampleReader
from lightning_hub.data.readers.sources import Input
from lightning_hub.data.report import SHOWN, DataReport, Reason
from lightning_hub.data.sample_store import Indices, SampleStore
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import DataError

_REMEDIES: dict[str, str] = {
    "unreadable": "mend them, or leave them out with data.on_bad: skip",
    "refused": "mend them, or leave them out with data.on_bad: skip",
    "too long": "raise data.max_seq_len, or choose data.on_long: truncate or drop",
    "no trained token": "check data.train_on and the roles, or leave them out with data.on_bad: skip",
}


class BadExamplesError(DataError):
    """Rows that cannot be used, listed by place."""

    def __init__(self, message: str, places: list[str], remedy: str) -> None:
        super().__init__(message, where=places[0].split(": ")[0], remedy=remedy)
        self.places = places

    def __str__(self) -> str:
        return "\n".join([f"{self.message}; {self.remedy}:", *(f"  {place}" for place in self.places)])


class SampleCollector:
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
        self._unmapped: set[str] | None = None
        self._wrong: Counter[Reason] = Counter()

    def read(self, given: Input) -> None:
        """Take in all rows of one input.

        Raises:
            DataError: 20 rows are wrong in a way that the settings do not let pass.
        """
        self.report.inputs.update(given.digest())
        reader = ExampleReader(self.settings, self.encoder)
        for outcome in reader.encoded_examples(given.examples()):
            self._account(outcome)
        for name in given.digest():
            self.report.formats[name] = reader.layout or "empty"
        self._unmapped = reader.mapped if self._unmapped is None else self._unmapped & reader.mapped
        for name in given.not_read:
            self.report.notes["files that are no data are not read"] += 1
            self.report.note_place("files that are no data are not read", name)
        self._inputs += 1

    def _account(self, outcome: EncodedExample) -> None:
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
        for remark in outcome.remarks:
            self.report.notes[remark] += 1
            self.report.note_place(remark, outcome.row.where)
        for sample in outcome.samples:
            self._store(sample)
            for note in sample.notes:
                if not note.endswith(CHARACTERS):
                    self.report.note_place(note, outcome.row.where)
        if len(outcome.samples) < len(outcome.all_samples):
            self.report.notes["samples dropped from rows that were kept"] += len(outcome.all_samples) - len(
                outcome.samples
            )
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
        raise BadExamplesError(f"{how_many} cannot be used ({reason})", self.report.places[reason], _REMEDIES[reason])

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
        for name in sorted(self._unmapped or ()):
            self.report.notes[f"column {name!r} of data.columns is in no row"] += 1
        samples = len(self._lengths)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(self._lengths, dtype=np.int64))])
        self._spooled = SampleStore(
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
        report.count_stored(SampleStore.load(folder), by_role)
        return report.as_dict()

    def close(self) -> None:
        """Remove the spool."""
        shutil.rmtree(self._folder)
