"""Collects the samples of all inputs of one split, and accounts for every example."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_hub.data.encode import ROLES, Encoder, Sample
from lightning_hub.data.encoded_example import EncodedExample, encode_examples
from lightning_hub.data.masking.dropped_text import CHARACTERS
from lightning_hub.data.readers.example_reader import ExampleReader
from lightning_hub.data.readers.sources import Input
from lightning_hub.data.report import SHOWN, BadExamplesError, DataReport, Reason
from lightning_hub.data.sample_store import Indices, SampleStore, ragged_ranges
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import DataError


def collect(inputs: Sequence[Input], settings: DataSettings, encoder: Encoder, spool: Path) -> CollectedSamples:
    """Read, encode and account for all examples of one split (training or validation).

    Args:
        inputs: Read one after the other.
        settings: Which examples are errors.
        encoder: Tokenises and masks them.
        spool: A folder for the samples; made here, and removed by :meth:`CollectedSamples.close`.

    Raises:
        DataError: Examples cannot be used, too many have no trained token, or none is left.
    """
    collector = SampleCollector(settings, spool)
    for source in inputs:
        reader = ExampleReader(settings)
        for example in encode_examples(reader, source.examples(), encoder):
            collector.add(example)
        collector.end_source(source, reader)
    return collector.finish()


class SampleCollector:
    """Writes samples to a spool folder and counts what happens to each example.

    Args:
        settings: Which examples are errors.
        spool: The folder; made here.
    """

    def __init__(self, settings: DataSettings, spool: Path) -> None:
        self.settings = settings
        self.report = DataReport()
        self._spool = spool
        spool.mkdir(parents=True)
        self._ids = (spool / "ids").open("wb")
        self._labels = (spool / "labels").open("wb")
        self._lengths: list[int] = []
        self._num_trained: list[int] = []
        self._by_role: list[list[int]] = []
        self._example_of_sample: list[int] = []
        self._places: list[str] = []
        self._source_of_example: list[int] = []
        self._num_sources = 0
        self._unused_columns: set[str] | None = None
        self._errors: Counter[Reason] = Counter()

    def add(self, example: EncodedExample) -> None:
        """Account for one example, and write its samples.

        Raises:
            DataError: As many examples as the message lists cannot be used, and the settings make this an error.
        """
        report, where = self.report, example.raw.where
        report.rows_read += 1
        if example.tokens_lost:
            report.truncated += 1
            report.tokens_lost += example.tokens_lost
            report.note_place("truncated", where, f"{example.tokens_lost} tokens cut off")
        if example.reason:
            report.drop(example.reason, where, example.detail)
            self._check_strict(example.reason)
            return
        report.rows_kept += 1
        for remark in example.remarks:
            report.notes[remark] += 1
            report.note_place(remark, where)
        for sample in example.samples:
            self._write(sample)
            for note in sample.notes:
                if not note.endswith(CHARACTERS):
                    report.note_place(note, where)
        if num_dropped := len(example.all_samples) - len(example.samples):
            report.notes["samples dropped from rows that were kept"] += num_dropped
        self._places.append(where)
        self._source_of_example.append(self._num_sources)

    def _write(self, sample: Sample) -> None:
        self._ids.write(sample.ids.data)
        self._labels.write(sample.labels.data)
        self._lengths.append(len(sample.ids))
        self._num_trained.append(sample.num_trained)
        self._by_role.append(sample.by_role)
        self._example_of_sample.append(len(self._places))
        if sample.notes:
            self.report.notes.update(sample.notes)

    def _check_strict(self, reason: Reason) -> None:
        bad = reason in ("unreadable", "refused") and self.settings.on_bad == "error"
        long = reason == "too long" and self.settings.on_long == "error"
        if bad or long:
            self._errors[reason] += 1
            if self._errors[reason] >= SHOWN:
                raise BadExamplesError(reason, f"{SHOWN} examples or more", self.report)

    def end_source(self, source: Input, reader: ExampleReader) -> None:
        """Note the hashes and the layout of one input, and what of it was not read."""
        digest = source.digest()
        self.report.inputs.update(digest)
        self.report.formats.update(dict.fromkeys(digest, reader.layout or "empty"))
        unused = reader.unused_columns
        self._unused_columns = unused if self._unused_columns is None else self._unused_columns & unused
        for name in source.not_read:
            self.report.notes["files that are no data are not read"] += 1
            self.report.note_place("files that are no data are not read", name)
        self._num_sources += 1

    def finish(self) -> CollectedSamples:
        """Check the split as a whole, and return what was collected.

        Raises:
            DataError: Examples cannot be used, too many have no trained token, or none is left.
        """
        self._ids.close()
        self._labels.close()
        self._check_whole()
        for name in sorted(self._unused_columns or ()):
            self.report.notes[f"column {name!r} of data.columns is in no row"] += 1
        samples = SampleStore(
            ids=np.memmap(self._spool / "ids", np.int32, mode="r"),
            labels=np.memmap(self._spool / "labels", np.int32, mode="r"),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(self._lengths, dtype=np.int64))]),
            num_trained=np.array(self._num_trained, dtype=np.int32),
            fingerprint="",  # of the stored order only
        )
        first_sample = np.searchsorted(np.array(self._example_of_sample), np.arange(len(self._places) + 1))
        assert first_sample[-1] == len(samples), "every sample belongs to a kept example"
        return CollectedSamples(
            report=self.report,
            samples=samples,
            by_role=np.array(self._by_role, dtype=np.int64),
            first_sample=first_sample.astype(np.int64),
            places=self._places,
            source_of_example=np.array(self._source_of_example, dtype=np.int64),
            spool=self._spool,
        )

    def _check_whole(self) -> None:
        report = self.report
        for reason, count in self._errors.items():
            raise BadExamplesError(reason, f"{count} example{'s' if count > 1 else ''}", report)
        masked = report.fully_masked = report.dropped["no trained token"]
        if masked > 0.01 * report.rows_read and self.settings.on_bad == "error":
            how_many = f"{masked} of {report.rows_read} examples, more than 1 %,"
            raise BadExamplesError("no trained token", how_many, report)
        if not report.rows_kept:
            why = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "the input is empty"
            raise DataError(
                f"there is no example to train on: {why}",
                where=", ".join(report.inputs),
                remedy="check the path and the file",
            )


@dataclass(frozen=True)
class CollectedSamples:
    """The samples of one split in the order of the input, before it is decided which are stored.

    Attributes:
        report: What happened to each example.
        samples: All samples, memory-mapped from the spool folder.
        by_role: Tokens of each of ``ROLES``, int64, shape ``(samples, roles)``.
        first_sample: The first sample of each kept example, int64, shape ``(examples + 1,)``.
        places: ``file:line`` of each kept example.
        source_of_example: The number of the source of each kept example, int64, shape ``(examples,)``.
        spool: The spool folder.
    """

    report: DataReport
    samples: SampleStore
    by_role: npt.NDArray[np.int64]
    first_sample: Indices
    places: list[str]
    source_of_example: Indices
    spool: Path

    @property
    def examples(self) -> Indices:
        """The numbers of all kept examples, int64, shape ``(examples,)``."""
        return np.arange(len(self.places), dtype=np.int64)

    def samples_of(self, examples: Indices) -> Indices:
        """The numbers of the samples of these examples, example by example.

        Args:
            examples: Numbers of kept examples, int64, shape ``(chosen,)``; repeats are allowed.

        Returns:
            int64, shape ``(samples of the chosen examples,)``.
        """
        return ragged_ranges(self.first_sample[examples], np.diff(self.first_sample)[examples])

    def drop_unchosen(self, examples: Indices) -> None:
        """Count kept examples as dropped, because the weight of their source is below 1."""
        for example in examples:
            self.report.drop("not chosen", self.places[example])
        self.report.rows_kept -= len(examples)

    def store(self, folder: Path, examples: Indices, report: DataReport) -> dict[str, object]:
        """Write the samples of these examples in this order; return the completed report."""
        order = self.samples_of(examples)
        self.samples.save(folder, order)
        totals = self.by_role[order].sum(axis=0)
        by_role = Counter({role: int(count) for role, count in zip(ROLES, totals, strict=True) if count})
        report.count_stored(SampleStore.load(folder), by_role)
        return report.as_dict()

    def close(self) -> None:
        """Remove the spool folder."""
        shutil.rmtree(self.spool)
