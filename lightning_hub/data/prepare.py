"""From named inputs to stored samples, in one pass.

1. Collect: read the examples, bring them into the normal form, tokenise and mask them, account for each (`collect`).
2. Choose: hold out validation examples, and apply the weights of the sources.
3. Store: write samples and reports into an entry of the cache.

A later call with the same inputs and settings, or another rank, maps the entry.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_hub.data.cache import Cache, code_version, key_of
from lightning_hub.data.collect import CollectedSamples, collect
from lightning_hub.data.encode import Encoder
from lightning_hub.data.masking.chat_template import resolve_template
from lightning_hub.data.masking.template_profile import backend_of
from lightning_hub.data.readers.sources import Input, open_source
from lightning_hub.data.report import DataReport
from lightning_hub.data.sample_store import Indices, SampleStore
from lightning_hub.data.settings import VAL_KEY, DataSettings
from lightning_hub.errors import DataError
from lightning_hub.ops.batch import IGNORE_INDEX
from lightning_hub.runs.files import write_json
from lightning_hub.runs.folder import default_cache_dir


@dataclass(frozen=True)
class Prepared:
    """Data that is ready for packing.

    Attributes:
        train: Training samples, memory-mapped.
        val: Validation samples, or None.
        report: What happened to every training example.
        val_report: The same for validation examples.
        cached: Whether the cache had the samples already.
        chat_template: The template that replaced the tokenizer's own, for the export; None if none did.
    """

    train: SampleStore
    val: SampleStore | None
    report: DataReport
    val_report: DataReport | None
    cached: bool
    chat_template: str | None

    def write_report(self, path: Path, **more: object) -> None:
        """Write ``data_report.json``, with more entries of other packages (how full the packed rows are)."""
        val = self.val_report.as_dict() if self.val_report else None
        write_json(path, {"schema": 1, **self.report.as_dict(), "val": val, **more}, fsync=True, indent=1)


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def prepare(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: Path | None = None,
    stop_ids: Iterable[int] = (),
    notify: Callable[[str], None] = _to_stderr,
) -> Prepared:
    """Prepare data, or map what an earlier call (or another rank) prepared from the same input.

    Args:
        settings: What to read and how.
        tokenizer: A fast tokenizer; its chat template is used unless the settings name another.
        cache_dir: Where prepared data is kept; by default ``LIGHTNING_HUB_CACHE`` or ``~/.cache/lightning-hub``.
        stop_ids: End-of-text ids of the model's generation config.
        notify: Prints a message for a person.

    Raises:
        ConfigError: A setting, a path, the template or the tokenizer cannot be used.
        DataError: The data cannot be trained on with these settings; lists the first 20 examples with file:line.
    """
    stop_ids = tuple(stop_ids)
    template = settings.chat_template and resolve_template(settings.chat_template, tokenizer)
    encoder = Encoder(settings, tokenizer, stop_ids)
    train_inputs = [open_source(source, settings.limits) for source in settings.sources]
    val_inputs = [open_source(source, settings.limits, VAL_KEY) for source in settings.val_sources]
    key = key_of(
        {
            "code": code_version(),
            "ignore_index": IGNORE_INDEX,
            "inputs": [given.digest() for given in train_inputs],
            "val_inputs": [given.digest() for given in val_inputs],
            "tokenizer": key_of({"engine": backend_of(tokenizer).to_str(), "map": str(tokenizer.special_tokens_map)}),
            "template": template or str(tokenizer.chat_template),
            "settings": settings.identity(),
            "stop_ids": sorted(stop_ids),
        }
    )

    def make(folder: Path) -> None:
        _write_entry(folder, settings, encoder, train_inputs, val_inputs)

    cache = Cache(cache_dir or default_cache_dir(), notify)
    with _tokenizer_threads_off():
        (train, val, reports), cached = cache.get_or_make(key, make, _load_entry)
    report = DataReport.from_dict(reports["train"])
    val_report = DataReport.from_dict(reports["val"]) if val is not None else None
    return Prepared(train, val, report, val_report, cached, template or None)


@contextmanager
def _tokenizer_threads_off() -> Iterator[None]:
    """Switch the tokenizer's own threads off (``num_proc`` sets the number of threads), and collect garbage rarely.

    Preparation makes many short-lived objects and few cycles: a search for cycles every 700 objects costs 5 %.
    """
    parallelism, thresholds = os.environ.get("TOKENIZERS_PARALLELISM"), gc.get_threshold()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(200_000, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if parallelism is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


def _write_entry(
    folder: Path, settings: DataSettings, encoder: Encoder, train_inputs: list[Input], val_inputs: list[Input]
) -> None:
    """Collect all samples, choose those of validation and training, and store them with their reports."""
    train = collect(train_inputs, settings, encoder, folder / "spool-train")
    reports: dict[str, object] = {"val": None}
    chosen = train.examples
    if settings.val_share is not None:
        chosen, held_out = split_examples(chosen, settings.val_share, settings.seed)
        train.report.set_aside = len(held_out)
        reports["val"] = train.store(folder / "val", held_out, _validation_report(train.report, len(held_out)))
    elif val_inputs:
        val = collect(val_inputs, settings, encoder, folder / "spool-val")
        reports["val"] = val.store(folder / "val", val.examples, val.report)
        val.close()
    chosen = _apply_source_weights(train, chosen, settings)
    reports["train"] = train.store(folder / "train", chosen, train.report)
    train.close()
    write_json(folder / "reports.json", reports, fsync=True)


def _load_entry(folder: Path) -> tuple[SampleStore, SampleStore | None, dict[str, dict[str, object]]]:
    reports = json.loads((folder / "reports.json").read_text(encoding="utf-8"))
    val = SampleStore.load(folder / "val") if reports["val"] else None
    return SampleStore.load(folder / "train"), val, reports


def split_examples(examples: Indices, share: float, seed: int) -> tuple[Indices, Indices]:
    """Hold out a share of the examples, at least one; the same examples and seed always give the same split.

    Returns:
        The numbers of the other examples, and of those held out.

    Raises:
        DataError: No example would be left to train on.
    """
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise DataError(
            f"a validation share of {share} of {len(examples)} examples leaves none to train on",
            where="data.init_args.val",
            remedy="give more examples or a smaller share",
        )
    held_out = pick(examples, count, seed)
    return np.setdiff1d(examples, held_out), held_out


def _validation_report(train: DataReport, count: int) -> DataReport:
    """The report of examples that were held out of the training inputs: all of them can be used."""
    return DataReport(rows_read=count, rows_kept=count, formats=train.formats, inputs=train.inputs)


def _apply_source_weights(train: CollectedSamples, examples: Indices, settings: DataSettings) -> Indices:
    """Repeat examples, or leave some out, as the weights of their sources say."""
    chosen = []
    for number, source in enumerate(settings.sources):
        own = examples[train.source_of_example[examples] == number]
        whole, fraction = int(source.weight), source.weight % 1
        extra = pick(own, round(fraction * len(own)), (settings.seed, number))
        chosen.append(np.concatenate([np.tile(own, whole), extra]))
        if whole == 0:
            train.drop_unchosen(np.setdiff1d(own, extra))
    if not any(map(len, chosen)):
        raise DataError(
            "the weights leave no example to train on", where="data.init_args.train", remedy="raise a weight"
        )
    return np.concatenate(chosen)


def pick(examples: Indices, count: int, seed: int | tuple[int, int]) -> Indices:
    """Choose examples by seed; they keep their order."""
    chosen: Indices = examples[np.sort(np.random.default_rng(seed).permutation(len(examples))[:count])]
    return chosen
