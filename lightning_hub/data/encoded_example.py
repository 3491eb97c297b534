"""Turns raw examples into tokenised samples, or a reason for dropping them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from lightning_hub.data.conversation import Example, Refused
from lightning_hub.data.encode import ROLES, Encoder, Sample
from lightning_hub.data.readers.example_reader import ExampleReader
from lightning_hub.data.readers.examples import RawExample
from lightning_hub.data.report import Reason
from lightning_hub.data.settings import DataSettings
from lightning_hub.ops.batch import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One example with its samples, or with the reason for dropping it.

    Attributes:
        raw: The example as read.
        layout: The layout of its input, in words.
        all_samples: Every sample of it, also those that are dropped.
        samples: The samples that are kept.
        reason: Why the example is dropped, or None.
        detail: More about the reason.
        tokens_lost: Tokens that truncation removed.
        remarks: What a person should know about the example.
    """

    raw: RawExample
    layout: str | None
    all_samples: Sequence[Sample] = ()
    samples: Sequence[Sample] = ()
    reason: Reason | None = None
    detail: str = ""
    tokens_lost: int = 0
    remarks: tuple[str, ...] = ()

    def reason_of(self, sample: Sample | None) -> str | None:
        """Why a sample of this example is dropped, or None."""
        if self.reason:
            return f"{self.reason}: {self.detail}" if self.detail else self.reason
        if sample is None or any(sample is kept for kept in self.samples):
            return None
        return "no trained token" if not sample.num_trained else "too long"


_NormalisedBatch = list[tuple[RawExample, Example | Refused]]
_Encoding = list[list[Sample] | Refused]


def encode_examples(
    reader: ExampleReader, raw_examples: Iterator[RawExample], encoder: Encoder
) -> Iterator[EncodedExample]:
    """Encode the examples of one input, several batches at the same time, in the order of the input.

    Threads, not processes: the tokenizer releases the interpreter's lock, and nothing has to be copied.

    Raises:
        DataError: None of the first examples shows a known layout.
    """
    settings = reader.settings
    pending: deque[tuple[_NormalisedBatch, Future[_Encoding]]] = deque()
    with ThreadPoolExecutor(settings.num_proc) as pool:
        for batch in reader.batches(raw_examples):
            good = [example for _, example in batch if not isinstance(example, Refused)]
            pending.append((batch, pool.submit(encoder.encode, good)))
            if len(pending) > settings.num_proc:
                done, encoding = pending.popleft()
                yield from _apply_limits(done, encoding.result(), reader)
        for done, encoding in pending:
            yield from _apply_limits(done, encoding.result(), reader)


def _apply_limits(batch: _NormalisedBatch, encoding: _Encoding, reader: ExampleReader) -> Iterator[EncodedExample]:
    """Join each raw example with its samples, and apply the limits of the settings."""
    encoded = iter(encoding)
    for raw, example in batch:
        samples = example if isinstance(example, Refused) else next(encoded)
        if isinstance(samples, Refused):
            reason: Reason = "unreadable" if raw.problem else "refused"
            yield EncodedExample(raw, reader.layout, reason=reason, detail=samples.why)
        else:
            assert not isinstance(example, Refused), "a refused example has no samples"
            yield _keep_fitting(raw, reader.layout, samples, example.remarks, reader.settings)


def _keep_fitting(
    raw: RawExample, layout: str | None, samples: list[Sample], remarks: tuple[str, ...], settings: DataSettings
) -> EncodedExample:
    """Truncate or drop samples that are too long; drop those without a trained token."""
    maximum = settings.max_seq_len
    longest = max([len(sample.ids) for sample in samples])
    lost = 0
    if longest > maximum and settings.on_long == "truncate":
        lost = sum(_truncate(sample, maximum) for sample in samples)
    elif longest > maximum:
        some_fit = any(len(sample.ids) <= maximum for sample in samples)
        if settings.on_long == "error" or not some_fit:
            detail = f"{longest} tokens, the maximum is {maximum}"
            return EncodedExample(raw, layout, samples, reason="too long", detail=detail)
    kept = [sample for sample in samples if sample.num_trained and len(sample.ids) <= maximum]
    if kept:
        return EncodedExample(raw, layout, samples, kept, tokens_lost=lost, remarks=remarks)
    detail = "every trained token was cut off" if lost else ""
    return EncodedExample(raw, layout, samples, reason="no trained token", detail=detail, tokens_lost=lost)


def _truncate(sample: Sample, maximum: int) -> int:
    """Cut a sample to the maximum; return the number of tokens that were removed."""
    lost = len(sample.ids) - maximum
    if lost <= 0:
        return 0
    sample.ids, sample.labels = sample.ids[:maximum], sample.labels[:maximum]
    sample.num_trained = int((sample.labels != IGNORE_INDEX).sum())
    sample.by_role = _subtract_from_roles(sample.by_role, lost)
    return lost


def _subtract_from_roles(by_role: list[int], lost: int) -> list[int]:
    """Subtract removed tokens from the roles at the end of samples: answers first."""
    left = list(by_role)
    for role in ("assistant", "tool", "user", *ROLES):
        taken = min(lost, left[ROLES.index(role)])
        left[ROLES.index(role)] -= taken
        lost -= taken
    return left
