"""Brings the raw examples of one input into the normal form."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, repeat

from lightning_hub.data.conversation import BadExampleError, Example, Refused
from lightning_hub.data.readers.examples import RawExample
from lightning_hub.data.readers.formats import normalise, rename
from lightning_hub.data.readers.layouts import Recognised, recognise
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import DataError

BATCH_SIZE = 512
"""Examples in a batch: enough work for several threads, little memory."""

_FIRST_BATCHES = (16, 16, 32, 64, 128, 256)
"""Small batches first, while the encoder learns the template's token patterns from examples that it masks slowly."""

_EXAMINED = 16
"""Examples among which the layout is looked for."""


class ExampleReader:
    """Recognises the layout of one input, and brings its examples into the normal form.

    Args:
        settings: The layout and the names of the columns.

    Attributes:
        recognised: The layout; None before an example was read.
        unused_columns: Columns that ``data.columns`` names and that no example has had so far.
    """

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        self.recognised: Recognised | None = None
        self.unused_columns = set(settings.columns.values())

    @property
    def layout(self) -> str | None:
        """The layout in words; None before an example was read."""
        return str(self.recognised) if self.recognised else None

    @property
    def one_sample_per_example(self) -> bool:
        """Whether each example gives exactly one sample."""
        known = self.recognised is not None and self.recognised.layout != "document"
        return known and not self.settings.expand_turns

    def recognise_layout(self, raw_examples: Iterator[RawExample]) -> Iterator[RawExample]:
        """Recognise the layout from the first readable example that shows it; return all examples.

        Raises:
            DataError: None of the first examples shows a known layout.
        """
        first = list(islice(raw_examples, _EXAMINED))
        refusal: DataError | None = None
        for raw in first:
            if raw.problem:
                continue
            try:
                self.recognised = recognise(rename(raw.data, self.settings.columns), self.settings.format, raw.where)
                break
            except DataError as error:
                refusal = refusal or error
        if self.recognised is None and refusal is not None:
            raise refusal
        return chain(first, raw_examples)

    def batches(self, raw_examples: Iterator[RawExample]) -> Iterator[list[tuple[RawExample, Example | Refused]]]:
        """Read batch by batch: each raw example with its normal form, or why it cannot be used.

        Raises:
            DataError: None of the first examples shows a known layout.
        """
        if self.recognised is None:
            raw_examples = self.recognise_layout(raw_examples)
        for size in chain(_FIRST_BATCHES, repeat(BATCH_SIZE)):
            batch = [(raw, self._normalise(raw)) for raw in islice(raw_examples, size)]
            if not batch:
                return
            yield batch

    def _normalise(self, raw: RawExample) -> Example | Refused:
        if raw.problem:
            return Refused(raw.problem)
        if self.unused_columns:
            self.unused_columns -= raw.data.keys()
        data = rename(raw.data, self.settings.columns)
        if self.recognised is None:
            self.recognised = recognise(data, self.settings.format, raw.where)
        try:
            return normalise(rename(data, self.recognised.columns), self.recognised.layout)
        except BadExampleError as error:
            return Refused(str(error))
        except RecursionError:
            return Refused("nested too deeply")
