"""The body of the ``data`` verb: what a model will see of each row, and whether it is trained on.

Rows go through the very reader and encoder that preparation uses, so that what is shown is what is stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_hub.data.encode import Encoder, Sample
from lightning_hub.data.outcomes import EncodedExample, ExampleReader
from lightning_hub.data.readers.sources import open_source
from lightning_hub.data.report import DataReport
from lightning_hub.data.sample_store import Ids
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import DataError
from lightning_hub.ops.rows import IGNORED

if TYPE_CHECKING:
    from rich.text import Text

View: TypeAlias = dict[str, object]
"""One sample as ``data --json`` shows it."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are a part of a character."""

_LONGEST = 24
"""Tokens after which bytes that make no character are given up on."""

_CONTROL = {code: f"\\x{code:02x}" for code in range(32)} | {127: "\\x7f"}
_SHOWN = _CONTROL | {10: "\\n", 13: "\\r", 9: "\\t"}


class Inspector:
    """Looks at the samples of the training inputs one by one.

    Args:
        settings: What a run would be given.
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
            return [self._view(outcome, part) for outcome, part in islice(self._samples(), limit)]
        outcome, part = self._nth(sample)
        return [self._view(outcome, part)]

    def _samples(self) -> Iterator[tuple[EncodedExample, Sample | None]]:
        """All samples as read, also dropped ones; None stands for a row that gave none."""
        for source in self.settings.sources:
            yield from _parts(
                ExampleReader(self.settings, self.encoder).encoded_examples(
                    open_source(source, self.settings.limits).examples()
                )
            )

    def _nth(self, number: int) -> tuple[EncodedExample, Sample | None]:
        if number < 1:
            raise DataError(f"{number} is no sample number", where="--sample", remedy="the first sample is 1")
        left = number - 1
        for source in self.settings.sources:
            reader = ExampleReader(self.settings, self.encoder)
            rows = reader.begin(open_source(source, self.settings.limits).examples())
            if reader.one_sample_per_example:
                left -= sum(1 for _ in islice(rows, left))
            for found in _parts(reader.encoded_examples(rows)):
                if not left:
                    return found
                left -= 1
        raise DataError("the input has fewer samples", where=f"--sample {number}", remedy="give a smaller number")

    def _view(self, outcome: EncodedExample, part: Sample | None) -> View:
        ids = part.ids if part else np.empty(0, np.int32)
        labels = part.labels if part else ids
        reason = outcome.reason_of(part)
        return {
            "source": outcome.row.where,
            "format": outcome.layout,
            "kept": reason is None,
            "reason": reason,
            "text": self._decode(ids) if part and not part.text else (part.text if part else ""),
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
            "trained_text": self._trained_texts(ids, labels),
            "num_tokens": len(ids),
            "num_trained": int((labels != IGNORED).sum()),
        }

    def _decode(self, ids: Ids) -> str:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    def _characters(self, ids: Ids) -> list[tuple[slice, str]]:
        """The tokens that belong together because each holds only a part of a character, with their text."""
        found: list[tuple[slice, str]] = []
        start = 0
        while start < len(ids):
            end = start + 1
            text = self._decode(ids[start:end])
            while text.endswith(_INCOMPLETE) and end < min(len(ids), start + _LONGEST):
                end += 1
                text = self._decode(ids[start:end])
            if text.endswith(_INCOMPLETE) and end > start + 1:  # no character comes of it
                end = start + 1
                text = self._decode(ids[start:end])
            found.append((slice(start, end), text))
            start = end
        return found

    def _trained_texts(self, ids: Ids, labels: Ids) -> list[str]:
        """The text of each trained stretch; a character that is trained in part is shown whole."""
        shown = labels != IGNORED
        if any(_INCOMPLETE in self._decode(stretch) for stretch in trained_stretches(labels)):
            for part, _ in self._characters(ids):
                shown[part] = shown[part].any()
        return [self._decode(stretch) for stretch in trained_stretches(np.where(shown, ids, IGNORED))]

    def pieces(self, view: View) -> list[tuple[str, bool]]:
        """The text of each token of a view, or of the tokens of one character, and whether it is trained on."""
        ids, labels = view["input_ids"], view["labels"]
        assert isinstance(ids, list), "a view's ids are a list"
        assert isinstance(labels, list), "a view's labels are a list"
        trained = np.array(labels) != IGNORED
        return [(text, bool(trained[part].any())) for part, text in self._characters(np.array(ids, np.int32))]

    @property
    def template(self) -> str | None:
        """The source of the chat template in use; None where no row needed one."""
        return self.encoder.reference_masker.render.source if "reference_masker" in vars(self.encoder) else None


def trained_stretches(labels: Ids) -> list[Ids]:
    """The stretches of trained tokens, in order."""
    trained = labels != IGNORED
    borders = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    return [labels[start:end] for start, end in zip(borders[::2], borders[1::2], strict=True)]


def _parts(encoded_examples: Iterable[EncodedExample]) -> Iterator[tuple[EncodedExample, Sample | None]]:
    for outcome in encoded_examples:
        if not outcome.all_samples:
            yield outcome, None
        for part in outcome.all_samples:
            yield outcome, part


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
        settings: What a run would be given.
        tokenizer: A fast tokenizer.
        sample: Only the one of this number, counted from 1.
        limit: At most this many samples.
        as_json: Print what the contract of ``data --json`` says and nothing else.
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
    """One sample for people: trained tokens in colour and between ⟦ and ⟧, so that the mark survives without colour.

    Control characters are shown by name; nothing in a data set can command the terminal.
    """
    from rich.text import Text  # 60 ms, for printing only

    fate = "kept" if view["kept"] else f"dropped: {view['reason']}"
    title = f"{view['source']} · {view['format']} · {fate} · {view['num_tokens']} tokens, {view['num_trained']} trained"
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
    """The text with control characters spelled out."""
    return text.translate(_SHOWN)


def visible_lines(text: str) -> str:
    """The same, with line ends left in place."""
    return text.translate(_CONTROL | {10: "\n"})


def report_lines(report: DataReport, name: str = "train") -> Sequence[str]:
    """A data report in a few lines."""
    rows = f"{name}: {report.rows_read} rows read, {report.rows_kept} kept"
    if report.set_aside:
        rows += f" ({report.set_aside} of them set aside for validation)"
    lines = [rows]
    lines += [f"  dropped, {reason}: {count}" for reason, count in report.dropped.items() if count]
    for reason, places in report.places.items():
        lines += [f"    {reason}: {visible(place)}" for place in places]
    lines += [f"  format of {source}: {layout}" for source, layout in report.formats.items()]
    lines.append(f"  {report.samples} samples, {report.tokens} tokens, {report.trained_share:.1%} of them trained")
    if report.truncated:
        lines.append(f"  truncated: {report.truncated} rows, {report.tokens_lost} tokens lost")
    lines += [f"  {role} tokens: {count}" for role, count in report.tokens_by_role.items()]
    lines += [f"  up to {size} tokens: {count}" for size, count in report.length_histogram.items()]
    lines += [f"  {note}: {count}" for note, count in report.notes.items()]
    return lines
