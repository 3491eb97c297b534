"""Rows of one input to what they came to: samples, or the reason why there are none."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, repeat

from lightning_hub.data.conversation import BadExampleError, Example
from lightning_hub.data.encode import ROLES, Encoder, Refused, Sample
from lightning_hub.data.readers.examples import RawExample
from lightning_hub.data.readers.formats import normalise, rename
from lightning_hub.data.readers.layouts import Recognised, recognise
from lightning_hub.data.report import Reason
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import DataError
from lightning_hub.ops.rows import IGNORED

BATCH = 512
"""Rows encoded at a time: enough to spread over threads, little memory."""

_LOOKED_AT = 16
"""Rows among which the layout is looked for."""


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """What one row came to.

    Attributes:
        row: The row as read.
        layout: How its source is laid out, in words.
        all_samples: Every sample that it gave, also those that are not kept.
        samples: Those that are kept.
        reason: Why the row is dropped, or None.
        detail: More about the reason.
        tokens_lost: Tokens that truncation cut off.
        remarks: What a person should know of the row.
    """

    row: RawExample
    layout: str | None
    all_samples: Sequence[Sample] = ()
    samples: Sequence[Sample] = ()
    reason: Reason | None = None
    detail: str = ""
    tokens_lost: int = 0
    remarks: tuple[str, ...] = ()

    def reason_of(self, part: Sample | None) -> str | None:
        """Why a sample of this row is dropped, or None."""
        if self.reason:
            return f"{self.reason}: {self.detail}" if self.detail else self.reason
        if part is None or any(part is kept for kept in self.samples):
            return None
        return "no trained token" if not part.num_trained else "too long"


def _batches(rows: Iterator[RawExample]) -> Iterator[list[RawExample]]:
    """Small batches first, while the encoder learns a template's habits from rows that it takes slowly."""
    for size in chain((16, 16, 32, 64, 128, 256), repeat(BATCH)):
        batch = list(islice(rows, size))
        if not batch:
            return
        yield batch


class ExampleReader:
    """Rows of one input to encoded_examples, in order.

    Args:
        settings: What rows must look like.
        encoder: Tokenises them.

    Attributes:
        mapped: Columns that ``data.columns`` names and no row has had so far.
    """

    def __init__(self, settings: DataSettings, encoder: Encoder) -> None:
        self.settings = settings
        self.encoder = encoder
        self.recognised: Recognised | None = None
        self.mapped = set(settings.columns.values())

    @property
    def layout(self) -> str | None:
        """How the source is laid out, in words; None before a row was read."""
        return str(self.recognised) if self.recognised else None

    def encoded_examples(self, rows: Iterator[RawExample]) -> Iterator[EncodedExample]:
        """Encode rows batch by batch, several at a time; encoded_examples come in the order of the rows.

        Threads, not processes: the tokenizer works outside the interpreter's lock, and nothing has to be copied.

        Raises:
            DataError: The layout of the first row is not recognised.
        """
        pending: deque[tuple[list[RawExample], list[Example | Refused], Future[list[list[Sample] | Refused]]]] = deque()
        with ThreadPoolExecutor(self.settings.num_proc) as pool:
            for batch in _batches(self.begin(rows)):
                examples = [self._example(row) for row in batch]
                good = [example for example in examples if not isinstance(example, Refused)]
                pending.append((batch, examples, pool.submit(self.encoder.encode, good)))
                if len(pending) > self.settings.num_proc:
                    yield from self._finish(*pending.popleft())
            while pending:
                yield from self._finish(*pending.popleft())

    def _finish(
        self, batch: list[RawExample], examples: list[Example | Refused], encoding: Future[list[list[Sample] | Refused]]
    ) -> Iterator[EncodedExample]:
        encoded = iter(encoding.result())
        for row, example in zip(batch, examples, strict=True):
            if isinstance(example, Refused):
                yield self._outcome(row, example)
            else:
                yield self._outcome(row, next(encoded), example.remarks)

    def begin(self, rows: Iterator[RawExample]) -> Iterator[RawExample]:
        """Recognise the layout by the first row that shows it; the rows come back whole.

        Raises:
            DataError: None of the first rows does.
        """
        if self.recognised is not None:
            return rows
        first = list(islice(rows, _LOOKED_AT))
        readable = [(rename(row.data, self.settings.columns), row.where) for row in first if not row.problem]
        refusal: DataError | None = None
        for data, where in readable:
            try:
                self.recognised = recognise(data, self.settings.format, where)
                break
            except DataError as error:
                refusal = refusal or error
        if self.recognised is None and refusal is not None:
            raise refusal
        return chain(first, rows)

    @property
    def one_sample_per_example(self) -> bool:
        """Whether counting rows is counting samples."""
        known = self.recognised is not None and self.recognised.layout != "document"
        return known and not self.settings.expand_turns

    def _example(self, row: RawExample) -> Example | Refused:
        if row.problem:
            return Refused(row.problem)
        if self.mapped:
            self.mapped -= row.data.keys()
        data = rename(row.data, self.settings.columns)
        if self.recognised is None:
            self.recognised = recognise(data, self.settings.format, row.where)
        try:
            return normalise(rename(data, self.recognised.columns), self.recognised.layout)
        except BadExampleError as error:
            return Refused(str(error))
        except RecursionError:
            return Refused("nested too deeply")

    def _outcome(
        self, row: RawExample, encoded: list[Sample] | Refused, remarks: tuple[str, ...] = ()
    ) -> EncodedExample:
        if isinstance(encoded, Refused):
            reason: Reason = "unreadable" if row.problem else "refused"
            return EncodedExample(row, self.layout, reason=reason, detail=encoded.why)
        maximum = self.settings.max_seq_len
        longest = max([len(sample.ids) for sample in encoded])
        lost = 0
        if longest > maximum and self.settings.on_long == "truncate":
            lost = sum(self._cut(sample) for sample in encoded)
        elif longest > maximum:
            fitting = any(len(sample.ids) <= maximum for sample in encoded)
            if self.settings.on_long == "error" or not fitting:
                detail = f"{longest} tokens, the maximum is {maximum}"
                return EncodedExample(row, self.layout, encoded, reason="too long", detail=detail)
        kept = [sample for sample in encoded if sample.num_trained and len(sample.ids) <= maximum]
        if kept:
            return EncodedExample(row, self.layout, encoded, kept, tokens_lost=lost, remarks=remarks)
        detail = "every trained token was cut off" if lost else ""
        return EncodedExample(row, self.layout, encoded, reason="no trained token", detail=detail, tokens_lost=lost)

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
