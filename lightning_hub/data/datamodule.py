"""The LightningDataModule: from conversations to optimizer steps."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Protocol, cast

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from lightning_hub.config.bounds import Bounds
from lightning_hub.data.checks import check_positions, check_tokenizer_fits
from lightning_hub.data.prepare import Prepared, prepare
from lightning_hub.data.prompts import Prompt, read_prompts
from lightning_hub.data.sample_store import SampleStore
from lightning_hub.data.settings import (
    DataSettings,
    ExampleDepth,
    ExampleMB,
    Format,
    InputError,
    NumProc,
    OnBad,
    OnLong,
    Seed,
    SeqLen,
    Source,
    TrainOn,
)
from lightning_hub.data.step_plan import BatchSettings, ResumePosition, StepLoader, StepPlan
from lightning_hub.errors import DataError
from lightning_hub.models.pretrained import Pretrained
from lightning_hub.parallel.data_parallel import data_parallel

RECIPE_NAMES = {"max_tokens": "max_tokens_per_gpu"}
"""Batch settings that have another name in a recipe."""

SAMPLES_PER_STEP = 32
"""The effective batch size if a recipe has neither it nor ``tokens_per_step``."""


class HasPretrained(Protocol):
    """A module that knows its pretrained model."""

    @property
    def pretrained(self) -> Pretrained:
        """The model on disk or on the hub."""


class ChatData(LightningDataModule):
    """Conversations, prompts with completions, documents or token ids, packed into exact optimizer steps.

    Args:
        train: A file, folder or hub id to train on, or a list of them, each with a weight if wanted.
        val: Data to validate on: a path, or the share of the training samples to set aside (0.02 is 2 %).
        format: How rows are laid out; auto recognises it and says so.
        columns: Where the input names its columns differently: our name to theirs, {prompt: question}.
        max_seq_len: The longest sample, in tokens.
        max_tokens_per_gpu: The most tokens of a packed row, which is one forward of one device; max_seq_len if null.
        effective_batch_size: Samples of an optimizer step over all devices; 32 if tokens_per_step is null too.
        tokens_per_step: Token slots of an optimizer step over all devices, instead of effective_batch_size.
        train_on: assistant trains on every assistant turn, last on the last one, completion on what follows the
            last user turn, all on every token.
        on_long: Samples over max_seq_len: refuse to start, cut them, or leave them out and count them.
        on_bad: Rows that cannot be used: refuse to start, or leave them out and count them.
        expand_turns: One sample for each assistant turn, so that the reasoning of earlier turns is trained too.
        chat_template: A template file or the name of a built-in one; the tokenizer's own if null.
        template_options: Variables for the template, such as {enable_thinking: false}.
        seed: Seed of the order, of the validation share and of fractional weights.
        shuffle: Whether each epoch has an order of its own.
        num_proc: Threads that tokenise at the same time.
        num_workers: Processes that build steps ahead; 0 builds them in the training process.
        max_example_mb: The largest row or document of an input, in megabytes, decompressed; a larger one is refused.
        max_example_depth: The most levels of lists and objects inside each other in one row.
        predict: A file of prompts for `predict`: JSON lines with "prompt" or "messages".
    """

    def __init__(
        self,
        train: str | list[str] | list[Source],
        val: str | float | None = None,
        format: Format = "auto",
        columns: dict[str, str] | None = None,
        max_seq_len: SeqLen = 2048,
        max_tokens_per_gpu: Annotated[int, Bounds(">= 1")] | None = None,
        effective_batch_size: Annotated[int, Bounds(">= 1")] | None = None,
        tokens_per_step: Annotated[int, Bounds(">= 1")] | None = None,
        train_on: TrainOn = "assistant",
        on_long: OnLong = "error",
        on_bad: OnBad = "error",
        expand_turns: bool = False,
        chat_template: str | None = None,
        template_options: dict[str, str | bool | int | float] | None = None,
        seed: Seed = 42,
        shuffle: bool = True,
        num_proc: NumProc = 1,
        num_workers: Annotated[int, Bounds(">= 0")] = 0,
        max_example_mb: ExampleMB = 64,
        max_example_depth: ExampleDepth = 1000,
        predict: str | None = None,
    ) -> None:
        super().__init__()
        self.settings = DataSettings(
            train=train,
            val=val,
            format=format,
            columns=columns or {},
            max_seq_len=max_seq_len,
            train_on=train_on,
            on_long=on_long,
            on_bad=on_bad,
            expand_turns=expand_turns,
            chat_template=chat_template,
            template_options=template_options or {},
            seed=seed,
            num_proc=num_proc,
            max_example_mb=max_example_mb,
            max_example_depth=max_example_depth,
        )
        if effective_batch_size is None and tokens_per_step is None:
            effective_batch_size = SAMPLES_PER_STEP
        self.batching = BatchSettings(
            max_tokens=max_tokens_per_gpu or max_seq_len,
            effective_batch_size=effective_batch_size,
            tokens_per_step=tokens_per_step,
            shuffle=shuffle,
            seed=seed,
        )
        self.num_workers = num_workers
        self.predict_file = predict
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._prepared: Prepared | None = None
        self._plan: StepPlan | None = None

    # ---- preparation -----------------------------------------------------------------------------------------------

    @property
    def prepared(self) -> Prepared:
        """The tokenised samples and their report."""
        assert self._prepared is not None, "setup has run"
        return self._prepared

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the samples, with the chat template that rendered them."""
        assert self._tokenizer is not None, "setup has run"
        return self._tokenizer

    @property
    def plan(self) -> StepPlan:
        """The optimizer steps of every epoch."""
        if self._plan is None:
            self._plan = StepPlan(self.prepared.train, self.batching)
        return self._plan

    def open(self, pretrained: Pretrained) -> Prepared:
        """Prepare the samples for a model, or read them from the cache.

        This is not a collective operation: ranks share the preparation through the file system, so a long preparation
        cannot run into a time-out.
        """
        if self._prepared is None:
            config = pretrained.config
            self._tokenizer = pretrained.tokenizer
            check_tokenizer_fits(self._tokenizer, config.get_text_config().vocab_size)
            check_positions(self.settings.max_seq_len, config)
            self._prepared = prepare(self.settings, self._tokenizer, stop_ids=pretrained.stop_ids)
            if self._prepared.chat_template is not None:
                self._tokenizer.chat_template = self._prepared.chat_template
        return self._prepared

    def setup(self, stage: str) -> None:
        """Prepare the samples for the module's model (called by Lightning before any weight is read)."""
        assert self.trainer is not None, "Lightning has attached the trainer"
        module = cast("HasPretrained", self.trainer.lightning_module)
        if stage != "predict":
            self.open(module.pretrained)

    def facts(self) -> dict[str, str]:
        """Return what decides the order and content of the steps: a resumed run must have the same.

        Samples count by their content (ids, labels, lengths, order), not by the path of their files or the version of
        the code that made them.
        """
        batching = asdict(self.batching)
        return {
            "samples": self.prepared.train.fingerprint,
            "tokenizer": tokenizer_hash(self.tokenizer),
            **{f"data.init_args.{RECIPE_NAMES.get(name, name)}": str(value) for name, value in batching.items()},
        }

    def packing_report(self) -> dict[str, float]:
        """Return how full the packed rows are and the number of steps in an epoch, for the data report."""
        return {
            "fill": self.plan.packing_efficiency(),
            "steps_per_epoch": len(self.plan),
            "max_tokens": self.batching.max_tokens,
        }

    # ---- loaders ---------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> StepLoader:
        """Return the steps of this rank; each item is one optimizer step."""
        return self._loader(self.plan, self._position)

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """Return the packed rows of this rank for validation, each as its own step; [] without validation data."""
        return [] if self.prepared.val is None else self._sequential_loader(self.prepared.val)

    test_dataloader = val_dataloader

    def eval_loader_for(self, pretrained: Pretrained, paths: str | list[str], where: str) -> StepLoader:
        """Return the packed rows of this rank for data that is evaluated only, as for validation.

        Args:
            pretrained: The model that the data is for.
            paths: Files, folders or hub ids; prepared with the settings of the run's own data.
            where: The option that names them, for errors.

        Raises:
            HubError: They cannot be used.
        """
        try:
            settings = replace(self.settings, train=paths, val=None)
            other = prepare(settings, self.tokenizer, stop_ids=pretrained.stop_ids).train
        except InputError as error:
            error.where = where
            raise
        return self._sequential_loader(other)

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """Return the prompts in lists of eight."""
        if self.predict_file is None:
            remedy = "give a file of JSON lines with --data.predict"
            raise DataError("no prompts are given", where="data.init_args.predict", remedy=remedy)
        prompts = cast("Dataset[Prompt]", read_prompts(Path(self.predict_file), self.settings.limits))
        return DataLoader(prompts, batch_size=8, collate_fn=list)

    def _sequential_loader(self, samples: SampleStore) -> StepLoader:
        """Return the packed rows of this rank in a fixed order, each as its own step."""
        assert self.trainer is not None, "Lightning has attached the trainer"
        slots = self.batching.max_tokens * data_parallel(self.trainer.strategy).size
        batching = BatchSettings(self.batching.max_tokens, None, slots, shuffle=False, seed=0)
        return self._loader(StepPlan(samples, batching), lambda: (0, 0))

    def _loader(self, plan: StepPlan, position: ResumePosition) -> StepLoader:
        assert self.trainer is not None, "Lightning has attached the trainer"
        shares = data_parallel(self.trainer.strategy)
        return StepLoader(plan, position, shares.rank, shares.size, self.num_workers)

    def _position(self) -> tuple[int, int]:
        """Return the epoch and its finished steps; Lightning has restored both before it asks for steps."""
        assert self.trainer is not None, "Lightning has attached the trainer"
        if getattr(self.trainer, "overfit_batches", 0):  # the same steps again and again
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.completed


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of how a tokenizer encodes a text; its current truncation and padding do not count."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    words = json.dumps([parts, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()
