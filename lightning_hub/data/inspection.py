"""The ``data`` command: which tokens a model gets from each example, and which of them are trained.

Examples go through the same reader and encoder as in preparation, so the command shows what is stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_hub.data.encode import Encoder, Sample
from lightning_hub.data.encoded_example import EncodedExample, encode_examples
from lightning_hub.data.readers.example_reader import ExampleReader
from lightning_hub.data.readers.sources import open_source
from lightning_hub.data.report import DataReport
from lightning_hub.data.sample_store import Ids
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import DataError
from lightning_hub.ops.batch import IGNORE_INDEX

if TYPE_CHECKING:
    from rich.text import Text

View: TypeAlias = dict[str, object]
"""One sample as ``data --json`` shows it."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""A tokenizer decodes bytes that are a part of a character as this."""

_LONGEST = 24
"""The most tokens that are tried as one character."""

_CONTROL = {code: f"\\x{code:02x}" for code in range(32)} | {127: "\\x7f"}
_SHOWN = _CONTROL | {10: "\\n", 13: "\\r", 9: "\\t"}


class Inspector:
    """Shows the samples of the training inputs one by one.

    Args:
        settings: The settings of the run.
        tokenizer: A fast tokenizer.
        stop_ids: End-of-text ids of the model's generation config.
    """

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int] = ()
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.encoder = Encoder(settings, tokenizer, stop_ids)

    def views(self, *, sample: int | None = None, limit: int | None = None) -> list[View]:
        """Describe samples in the order of the input.

        Args:
            sample: Only the one of this number, counted from 1.
            limit: At most this many.

        Raises:
            DataError: The input has no sample of that number.
        """
        if sample is None:
            return [self._view(*found) for found in islice(self._samples(), limit)]
        return [self._view(*self._nth(sample))]

    def _samples(self) -> Iterator[tuple[EncodedExample, Sample | None]]:
        """All samples as read, also dropped ones; None if an example gives no sample."""
        for source in self.settings.sources:
            raw_examples = open_source(source, self.settings.limits).examples()
            yield from _samples_of(encode_examples(ExampleReader(self.settings), raw_examples, self.encoder))

    def _nth(self, number: int) -> tuple[EncodedExample, Sample | None]:
        if number < 1:
            raise DataError(f"{number} is not a sample number", where="--sample", remedy="the first sample is 1")
        left = number - 1
        for source in self.settings.sources:
            reader = ExampleReader(self.settings)
            raw_examples = reader.recognise_layout(open_source(source, self.settings.limits).examples())
            if reader.one_sample_per_example:
                left -= sum(1 for _ in islice(raw_examples, left))
            for found in _samples_of(encode_examples(reader, raw_examples, self.encoder)):
                if not left:
                    return found
                left -= 1
        raise DataError("the input has fewer samples", where=f"--sample {number}", remedy="give a smaller number")

    def _view(self, example: EncodedExample, sample: Sample | None) -> View:
        ids = sample.ids if sample else np.empty(0, np.int32)
        labels = sample.labels if sample else ids
        reason = example.reason_of(sample)
        return {
            "source": example.raw.where,
            "format": example.layout,
            "kept": reason is None,
            "reason": reason,
            "text": (sample.text or self._decode(ids)) if sample else "",
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
            "trained_text": self._trained_texts(ids, labels),
            "num_tokens": len(ids),
            "num_trained": int((labels != IGNORE_INDEX).sum()),
        }

    def _decode(self, ids: Ids) -> str:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    def _characters(self, ids: Ids) -> list[tuple[slice, str]]:
        """The text of each token, or of the tokens that are one character together."""
        found: list[tuple[slice, str]] = []
        start = 0
        while start < len(ids):
            end = start + 1
            text = self._decode(ids[start:end])
            while text.endswith(_INCOMPLETE) and end < min(len(ids), start + _LONGEST):
                end += 1
                text = self._decode(ids[start:end])
            if text.endswith(_INCOMPLETE) and end > start + 1:  # these bytes are not a character
                end = start + 1
                text = self._decode(ids[start:end])
            found.append((slice(start, end), text))
            start = end
        return found

    def _trained_texts(self, ids: Ids, labels: Ids) -> list[str]:
        """The text of each trained span; a character that is trained in part is shown completely."""
        shown = labels != IGNORE_INDEX
        if any(_INCOMPLETE in self._decode(span) for span in trained_spans(labels)):
            for part, _ in self._characters(ids):
                shown[part] = shown[part].any()
        return [self._decode(span) for span in trained_spans(np.where(shown, ids, IGNORE_INDEX))]

    def pieces(self, view: View) -> list[tuple[str, bool]]:
        """The text of each token of a view, or of the tokens of one character, and whether it is trained on."""
        ids, labels = view["input_ids"], view["labels"]
        assert isinstance(ids, list), "a view's ids are a list"
        assert isinstance(labels, list), "a view's labels are a list"
        trained = np.array(labels) != IGNORE_INDEX
        return [(text, bool(trained[part].any())) for part, text in self._characters(np.array(ids, np.int32))]

    @property
    def template(self) -> str | None:
        """The source of the chat template in use; None if no example needed one."""
        return self.encoder.reference_masker.render.source if "reference_masker" in vars(self.encoder) else None


def trained_spans(labels: Ids) -> list[Ids]:
    """The ids of each span of trained tokens, in order."""
    trained = labels != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    return [labels[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _samples_of(examples: Iterable[EncodedExample]) -> Iterator[tuple[EncodedExample, Sample | None]]:
    for example in examples:
        if not example.all_samples:
            yield example, None
        for sample in example.all_samples:
            yield example, sample


def describe(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sample: int | None = None,
    limit: int | None = None,
    as_json: bool = False,
    stop_ids: Iterable[int] = (),
) -> None:
    """Print samples: as one JSON list, or for people, with the template's source at the end.

    Args:
        settings: The settings of the run.
        tokenizer: A fast tokenizer.
        sample: Only the one of this number, counted from 1.
        limit: At most this many samples.
        as_json: Print one JSON list and nothing else.
        stop_ids: End-of-text ids of the model's generation config.
    """
    inspector = Inspector(settings, tokenizer, stop_ids)
    views = inspector.views(sample=sample, limit=limit)
    if as_json:
        print(json.dumps(views, ensure_ascii=False))
        return
    from rich.console import Console  # 60 ms, for printing only

    console = Console(highlight=False, soft_wrap=True)
    for view in views:
        console.print(render_view(inspector, view), end="\n\n")
    if inspector.template is not None:
        console.print(f"chat template in use:\n{visible_lines(inspector.template)}", markup=False)


def render_view(inspector: Inspector, view: View) -> Text:
    """One sample for people: trained tokens in colour and between ⟦ and ⟧, for terminals without colour.

    Control characters are shown by name, so that data cannot control the terminal.
    """
    from rich.text import Text  # 60 ms, for printing only

    outcome = "kept" if view["kept"] else f"dropped: {view['reason']}"
    title = (
        f"{view['source']} · {view['format']} · {outcome} · {view['num_tokens']} tokens, {view['num_trained']} trained"
    )
    text = Text(title, style="bold").append("\n")
    inside = False
    for piece, trained in inspector.pieces(view):
        if trained != inside:
            text.append("⟦" if trained else "⟧", style="bold green")
            inside = trained
        text.append(visible(piece), style="green" if trained else "dim")
        if piece.endswith("\n"):
            text.append("\n")
    return text.append("⟧" if inside else "", style="bold green")


def visible(text: str) -> str:
    """The text with control characters written as escapes."""
    return text.translate(_SHOWN)


def visible_lines(text: str) -> str:
    """The same, but line ends stay."""
    return text.translate(_CONTROL | {10: "\n"})


def report_lines(report: DataReport, name: str = "train") -> Sequence[str]:
    """A data report in a few lines."""
    first = f"{name}: {report.rows_read} examples read, {report.rows_kept} kept"
    if report.set_aside:
        first += f" ({report.set_aside} of them held out for validation)"
    lines = [first]
    lines += [f"  dropped, {reason}: {count}" for reason, count in report.dropped.items() if count]
    for reason, places in report.places.items():
        lines += [f"    {reason}: {visible(place)}" for place in places]
    lines += [f"  format of {source}: {layout}" for source, layout in report.formats.items()]
    lines.append(f"  {report.samples} samples, {report.tokens} tokens, {report.trained_share:.1%} of them trained")
    if report.truncated:
        lines.append(f"  truncated: {report.truncated} examples, {report.tokens_lost} tokens lost")
    lines += [f"  {role} tokens: {count}" for role, count in report.tokens_by_role.items()]
    lines += [f"  up to {size} tokens: {count}" for size, count in report.length_histogram.items()]
    lines += [f"  {note}: {count}" for note, count in report.notes.items()]
    return lines
