"""From named inputs to stored samples: read, normalise, encode, account, split, weigh, store."""

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
from lightning_hub.data.collect import SampleCollector
from lightning_hub.data.encode import Encoder
from lightning_hub.data.masking.chat_template import resolve_template
from lightning_hub.data.masking.template_profile import backend_of
from lightning_hub.data.readers.sources import Input, open_source
from lightning_hub.data.report import DataReport
from lightning_hub.data.sample_store import Indices, SampleStore
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import DataError
from lightning_hub.runs.files import write_json
from lightning_hub.runs.folder import default_cache_dir


@dataclass(frozen=True)
class Prepared:
    """Data that is ready for packing.

    Attributes:
        train: Training samples, memory-mapped.
        val: Validation samples, or None.
        report: What became of every training row.
        val_report: The same for validation rows.
        cached: Whether nothing had to be tokenised.
        chat_template: The template that replaced the tokenizer's own; an export must carry it. None if none did.
    """

    train: SampleStore
    val: SampleStore | None
    report: DataReport
    val_report: DataReport | None
    cached: bool
    chat_template: str | None

    def write_report(self, path: Path, **more: object) -> None:
        """Write ``data_report.json``, with whatever later rooms have to add (packing fill)."""
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
        notify: Tells a person what is worth knowing.

    Raises:
        ConfigError: A setting, a path, the template or the tokenizer cannot be used.
        DataError: The data cannot be trained on as asked; lists the first 20 rows with file:line.
    """
    stop_ids = tuple(stop_ids)
    template = settings.chat_template and resolve_template(settings.chat_template, tokenizer)
    job = _Job(settings, Encoder(settings, tokenizer, stop_ids))
    key = key_of(
        {
            "code": code_version(),
            "inputs": [given.digest() for given in job.train],
            "val_inputs": [given.digest() for given in job.val],
            "tokenizer": key_of({"engine": backend_of(tokenizer).to_str(), "map": str(tokenizer.special_tokens_map)}),
            "template": template or str(tokenizer.chat_template),
            "settings": settings.identity(),
            "stop_ids": sorted(stop_ids),
        }
    )
    cache = Cache(cache_dir or default_cache_dir(), notify)
    with _tokenizer_threads_off():
        (train, val, reports), cached = cache.get_or_make(key, lambda folder: job.make(folder, key), _load)
    report = DataReport.from_dict(reports["train"])
    val_report = DataReport.from_dict(reports["val"]) if val is not None else None
    return Prepared(train, val, report, val_report, cached, template or None)


@contextmanager
def _tokenizer_threads_off() -> Iterator[None]:
    """Keep the tokenizer from starting threads of its own (``num_proc`` says how many there are), and collect rarely.

    Preparation makes many short-lived objects and hardly a cycle: looking for cycles every 700 objects costs 5 %.
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


def _load(folder: Path) -> tuple[SampleStore, SampleStore | None, dict[str, dict[str, object]]]:
    reports = json.loads((folder / "reports.json").read_text(encoding="utf-8"))
    val = SampleStore.load(folder / "val") if reports["val"] else None
    return SampleStore.load(folder / "train"), val, reports


class _Job:
    """One preparation."""

    def __init__(self, settings: DataSettings, encoder: Encoder) -> None:
        self.settings = settings
        self.encoder = encoder
        self.train: list[Input] = [open_source(source, settings.limits) for source in settings.sources]
        self.val: list[Input] = [open_source(source, settings.limits) for source in settings.val_sources]

    def make(self, folder: Path, key: str) -> None:
        """Write the whole entry."""
        intake = self._take(self.train, folder / "spool-train")
        reports: dict[str, object] = {"val": None}
        chosen = intake.rows
        if self.settings.val_share is not None:
            chosen, aside = split_rows(chosen, self.settings.val_share, self.settings.seed)
            intake.report.set_aside = len(aside)
            reports["val"] = intake.store(
                folder / "val", intake.samples_of(aside), f"{key}-val", _validation_report(intake, aside)
            )
        elif self.val:
            val = self._take(self.val, folder / "spool-val")
            reports["val"] = val.store(folder / "val", val.samples_of(val.rows), f"{key}-val", val.report)
            val.close()
        chosen = self._apply_source_weights(intake, chosen)
        reports["train"] = intake.store(folder / "train", intake.samples_of(chosen), f"{key}-train", intake.report)
        intake.close()
        write_json(folder / "reports.json", reports, fsync=True)

    def _take(self, inputs: list[Input], spool: Path) -> SampleCollector:
        intake = SampleCollector(self.settings, self.encoder, spool)
        for given in inputs:
            intake.read(given)
        intake.finish()
        return intake

    def _apply_source_weights(self, intake: SampleCollector, rows: Indices) -> Indices:
        """Repeat and leave out rows as the weights of their sources say."""
        kept = []
        for number, source in enumerate(self.settings.sources):
            mine = rows[intake.source_of(rows) == number]
            whole, fraction = int(source.weight), source.weight % 1
            extra = pick(mine, round(fraction * len(mine)), (self.settings.seed, number))
            kept.append(np.concatenate([np.tile(mine, whole), extra]))
            if whole == 0:
                intake.leave_out(np.setdiff1d(mine, extra))
        chosen = np.concatenate(kept)
        if not len(chosen):
            raise DataError("the weights leave no row to train on", where="data.train", remedy="raise a weight")
        return chosen


def _validation_report(intake: SampleCollector, rows: Indices) -> DataReport:
    """The report of rows that training gave away: all of them were good."""
    return DataReport(
        rows_read=len(rows), rows_kept=len(rows), formats=intake.report.formats, inputs=intake.report.inputs
    )


def pick(rows: Indices, count: int, seed: int | tuple[int, int]) -> Indices:
    """Choose rows by seed and keep them in their order."""
    chosen: Indices = rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])]
    return chosen


def split_rows(rows: Indices, share: float, seed: int) -> tuple[Indices, Indices]:
    """Set a share of the rows aside, at least one; the same rows and seed always give the same split.

    Raises:
        DataError: Nothing would be left to train on.
    """
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise DataError(
            f"a validation share of {share} of {len(rows)} rows leaves none to train on",
            where="data.val",
            remedy="give more rows or a smaller share",
        )
    aside = pick(rows, count, seed)
    return np.setdiff1d(rows, aside), aside
