"""One training process from the parsed recipe to the export, with every ending said in the run folder."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_hub.callbacks import live
from lightning_hub.callbacks.checkpoints import SaveCheckpoints, StopRun, Wish
from lightning_hub.callbacks.progress import ProgressLine
from lightning_hub.callbacks.recorder import Recorder
from lightning_hub.callbacks.samples import GenerateSamples
from lightning_hub.checkpoints.export import write_export
from lightning_hub.checkpoints.plugin import FolderCheckpointIO
from lightning_hub.checkpoints.settings import CheckpointSettings
from lightning_hub.errors import ExitCode, HubError, NoCheckpointError
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.manifest import chosen, newest_whole, step_of
from lightning_hub.runs.rank import RankWriter
from lightning_hub.runs.samples import SamplesWriter
from lightning_hub.runs.writer import RunWriter
from lightning_hub.training.announcement import Announcement
from lightning_hub.training.facts import recipe_facts
from lightning_hub.training.parser import RecipeCLI


class HardStop(BaseException):
    """A second interrupt: stop at once. No KeyboardInterrupt, which Lightning turns into an exit code of its own."""


class Session:
    """One attempt of a run in this process.

    Args:
        tree: The whole recipe, checked, with its defaults.
        run: The run's files; closed in the end.
        resume: auto, must, never, or the path of a checkpoint.
        trust_remote_code: Whether Python files of the model may run.
        allow_changed_data: Whether a resume may find other data or batch settings.
        trust_checkpoint: Whether a checkpoint without a manifest may be resumed from.
    """

    def __init__(
        self,
        tree: dict[str, Any],
        run: RunWriter,
        *,
        resume: str,
        trust_remote_code: bool = False,
        allow_changed_data: bool = False,
        trust_checkpoint: bool = False,
    ) -> None:
        self.tree = tree
        self.run = run
        self.folder = run.folder
        self.resume = resume
        self.trust_remote_code = trust_remote_code
        self.allow_changed_data = allow_changed_data
        self.trust_checkpoint = trust_checkpoint
        self.val_losses: dict[int, float] = {}
        self._signals = 0

    def fit(self) -> int:
        """Train, export, and return the exit code; every ending stands in ``status.json``.

        Raises:
            HubError: What ended the run, with the exit code that it means by now.
        """
        code: int = ExitCode.FAILED
        rank: RankWriter | None = None
        try:
            checkpoint = self._checkpoint()
            step = step_of(checkpoint) if checkpoint else 0
            reason = f"resumed from {checkpoint.name}" if checkpoint else "first start"
            attempt = self.run.start_attempt(reason, step=step, checkpoint=checkpoint)
            rank = RankWriter(self.folder, attempt, trouble=self.run.trouble)
            rank.start()
            with self._stop_signals():
                code = self._train(rank, checkpoint)
        except (Exception, HardStop) as error:
            code = self._failed(error, rank)
            if not isinstance(error, HardStop):
                if isinstance(error, HubError):
                    error.exit_code = ExitCode(code)
                raise
            print(error, file=sys.stderr)
        finally:
            if rank is not None:
                rank.close()
            self.run.close(code)
        return code

    def _checkpoint(self) -> Path | None:
        """Return what to go on from; damaged checkpoints are named and passed over."""
        if self.resume == "never":
            return None
        if self.resume not in ("auto", "must"):
            return chosen(self.resume, trusted=self.trust_checkpoint)
        found, damaged = newest_whole(self.folder.checkpoints)
        for error in damaged:
            print(f"warning: {error}; trying an older one", file=sys.stderr)
            self.run.event("damaged checkpoint", path=error.where, reason=error.message)
        if found is None and (self.resume == "must" or damaged):
            remedy = "start a new run, or give --resume auto to begin again" if not damaged else "start a new run"
            where = str(self.folder.checkpoints)
            raise NoCheckpointError("there is no checkpoint to go on from", where=where, remedy=remedy)
        return found

    def _train(self, rank: RankWriter, checkpoint: Path | None) -> int:
        facts = recipe_facts(self.tree)
        recorder = Recorder(rank, self.run)
        self.val_losses = recorder.val_losses
        trial = bool(self.tree["trainer"].get("fast_dev_run"))

        def ours(settings: CheckpointSettings) -> list[Callback]:
            saver = SaveCheckpoints(
                settings,
                self.folder.checkpoints,
                facts,
                wish=lambda: self._wish(rank),
                saved=lambda step, path: self.run.event("checkpoint", step=step, path=path.name),
                allow_changed_data=self.allow_changed_data,
            )
            return [recorder, Announcement(), ProgressLine(recorder), *([] if trial else [saver])]

        checkpoint_io = FolderCheckpointIO(facts, trusted=self.trust_checkpoint)
        cli = build(self.tree, self.folder.path, ours, checkpoint_io, self.trust_remote_code)
        module, data, trainer = cli.model, cli.datamodule, cli.trainer
        with SamplesWriter(self.folder.samples) as samples:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's connector
                if isinstance(callback, GenerateSamples):
                    callback.write = samples.write
            trainer.fit(module, data, ckpt_path=checkpoint)
        if not trial:
            rank.pulse.do("export")
            model, weights = module.export_state()
            write_export(self.folder.export, model, weights, data.tokenizer)
        self.run.set_status("finished", step=trainer.global_step, exit_code=0)
        return ExitCode.DONE

    def _failed(self, error: BaseException, rank: RankWriter | None) -> int:
        """Write how the run ended and return the exit code."""
        step = rank.pulse.step if rank is not None else 0
        if isinstance(error, StopRun):
            self.run.set_status("stopped", reason=error.message, step=step, exit_code=int(error.exit_code))
            return error.exit_code
        code: int = ExitCode.FAILED
        if isinstance(error, HubError) and (step == 0 or error.exit_code != ExitCode.WRONG_INPUT):
            code = error.exit_code  # a person's fault after the first step is a failed run
        if isinstance(error, HardStop):
            code = ExitCode.HARD_STOP
        record = rank.record_error(error) if rank is not None else None
        reason = str(error) or type(error).__name__
        self.run.set_status("failed", reason=reason, step=step, exit_code=int(code), error=record)
        return code

    # ---- wishes ----------------------------------------------------------------------------------------------------

    def _wish(self, rank: RankWriter) -> Wish:
        if self._signals or rank.wishes_stop():
            self.run.set_status("stopping")
            return "stop"
        return "checkpoint" if rank.wishes_checkpoint() else None

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Turn SIGTERM and the first SIGINT into a wish; a second SIGINT stops at once.

        A handler only counts: what it asks for happens at the next step boundary, in the normal loop.
        """

        def count(number: int, frame: FrameType | None) -> None:
            self._signals += 1
            if number == signal.SIGINT and self._signals > 1:
                raise HardStop("stopped at once; the newest checkpoint is untouched")

        before = {number: signal.signal(number, count) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def build(
    tree: dict[str, Any],
    root: Path | None = None,
    callbacks: Callable[[CheckpointSettings], Sequence[Callback]] = lambda settings: (),
    checkpoint_io: FolderCheckpointIO | None = None,
    trust_remote_code: bool = False,
) -> RecipeCLI:
    """Make module, data and trainer of a recipe; nothing is read yet."""
    _quieten()
    given = {key: value for key, value in tree.items() if value is not None}
    if root is not None:
        given["trainer"] = {**given["trainer"], "logger": _with_folder(given["trainer"]["logger"], root / "loggers")}
    cli = RecipeCLI(given, root=root, callbacks=callbacks, checkpoint_io=checkpoint_io)
    cli.model.trust_remote_code = trust_remote_code
    return cli


def export(tree: dict[str, Any], folder: RunFolder, target: Path, *, trust_remote_code: bool = False) -> None:
    """Write the export of a run from its newest whole checkpoint, in one process, whatever wrote it.

    The model is built once, empty, and filled tensor by tensor.

    Raises:
        NoCheckpointError: The run has none.
    """
    found, damaged = newest_whole(folder.checkpoints)
    if found is None:
        reason = f"there is no whole checkpoint ({damaged[0]})" if damaged else "there is no checkpoint"
        raise NoCheckpointError(reason, where=str(folder.checkpoints), remedy="train on, or start a new run")
    alone = {**tree["trainer"], "num_nodes": 1, "devices": 1, "strategy": "auto"}
    cli = build({**tree, "trainer": alone}, trust_remote_code=trust_remote_code)
    module, data = cli.model, cli.datamodule
    module.trainer = cli.trainer
    module.build()
    live.fill_weights(module, FolderCheckpointIO().load_checkpoint(found)["restored"].weights)
    data.open(module.pretrained)
    model, weights = module.export_state()
    write_export(target, model, weights, data.tokenizer)


def measure(tree: dict[str, Any], verb: str, *, trust_remote_code: bool) -> dict[str, float]:
    """Run Lightning's validation or test loop and return its metrics."""
    cli = build(tree, trust_remote_code=trust_remote_code)
    loop = cli.trainer.validate if verb == "validate" else cli.trainer.test
    loop(cli.model, cli.datamodule, verbose=False)
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def answer(tree: dict[str, Any], *, trust_remote_code: bool) -> list[dict[str, Any]]:
    """Answer the prompts of ``data.predict`` and return prompts with completions, in order."""
    cli = build(tree, trust_remote_code=trust_remote_code)
    batches: Any = cli.trainer.predict(cli.model, cli.datamodule)
    answers = [text for batch in batches for text in batch]
    prompts = [prompt for batch in cli.datamodule.predict_dataloader() for prompt in batch]
    return [{"messages": prompt, "completion": text} for prompt, text in zip(prompts, answers, strict=True)]


def _with_folder(logger: Any, folder: Path) -> Any:
    """Return the loggers of a recipe, writing to ``folder`` where the recipe names no place."""
    if isinstance(logger, list):
        return [_with_folder(one, folder) for one in logger]
    if not isinstance(logger, dict) or logger.get("init_args", {}).get("save_dir", "given") is not None:
        return logger
    folder.mkdir(mode=0o700, exist_ok=True)
    return {**logger, "init_args": {**logger["init_args"], "save_dir": str(folder)}}


def _quieten() -> None:
    """Leave out what Lightning and transformers say to people who wrote their own loop."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
