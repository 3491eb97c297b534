"""Trains one rank, from the parsed recipe to the export. Every end is written to the run folder."""

from __future__ import annotations

import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_hub.callbacks.checkpoint_saver import CheckpointSaver, SaveRequest, StopRun
from lightning_hub.callbacks.generate_samples import GenerateSamples
from lightning_hub.callbacks.keep_memory import KeepMemory
from lightning_hub.callbacks.progress import ProgressLine
from lightning_hub.callbacks.recorder import Recorder
from lightning_hub.callbacks.run_summary import RunSummary
from lightning_hub.checkpoints import state_dict
from lightning_hub.checkpoints.checkpoint_io import FolderCheckpointIO
from lightning_hub.checkpoints.resume_check import check_fixed_options, check_limits, recipe_fingerprint
from lightning_hub.checkpoints.settings import CheckpointSettings
from lightning_hub.config.resolved import ResolvedConfig
from lightning_hub.errors import ConfigError, ExitCode, HubError, NoCheckpointError
from lightning_hub.launch.attempt import StartedAttempt
from lightning_hub.launch.environment import ProcessInfo
from lightning_hub.launch.options import RunOptions
from lightning_hub.methods.causal_lm import CausalLMModule
from lightning_hub.methods.run_context import RunContext, run_context
from lightning_hub.parallel.lightning_internals import disable_signal_handlers
from lightning_hub.parallel.process_group import HubClusterEnvironment
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.manifest import newest_valid
from lightning_hub.runs.rank_writer import RankWriter
from lightning_hub.runs.samples import SamplesWriter
from lightning_hub.runs.summary import run_summary
from lightning_hub.runs.writer import StatusWriter
from lightning_hub.training.recipe_cli import RecipeCLI
from lightning_hub.training.stop_requests import HardStop, RequestKind, StopRequests, requeue


class TrainingRun:
    """One rank of one attempt, from the parsed recipe to the export.

    Args:
        config: The whole recipe, checked, with its defaults.
        begun: The attempt.
        status: Writes the state of the run; on rank 0 only.
        environment: Rank and world size; None in a single process.
        options: What the user allows.
        is_summed_up: Whether a summary is printed at the end; the demo prints its own.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        begun: StartedAttempt,
        status: StatusWriter | None,
        *,
        environment: HubClusterEnvironment | None = None,
        options: RunOptions | None = None,
        is_summed_up: bool = True,
    ) -> None:
        self.is_summed_up = is_summed_up
        self.config = config
        self.begun = begun
        self.folder = begun.folder
        self.status = status
        self.environment = environment
        self.process = environment.process if environment else ProcessInfo()
        self.options = options or RunOptions()
        self.stop_requests = StopRequests(hard=self.process.is_single)
        self.rank = RankWriter(
            begun.folder,
            begun.attempt,
            rank=self.process.rank,
            world_size=self.process.world_size,
            node=self.process.node_rank,
            trouble=status.trouble if status else None,
        )
        self.recorder = Recorder(self.rank, status)

    def fit(self) -> int:
        """Train, export, and return the exit code; every end is written to the run folder.

        Raises:
            HubError: What ended the run, with its exit code.
        """
        try:
            with self.stop_requests.listening():
                self.rank.start(shown=self.process.launcher != "fit")
                if self.status is not None:
                    print(f"run    {self.folder.path}", flush=True)
                code = self._train()
        except HardStop as stop:
            print(stop, file=sys.stderr)
            return self._failed(stop)
        except Exception as error:
            code = self._failed(error)
            if isinstance(error, HubError):
                error.exit_code = ExitCode(code)
            raise
        else:  # the run is finished: an error in the summary does not make it fail
            self._sum_up()
            return code
        finally:
            if self.status is not None:
                self.status.event("timings", attempt=self.begun.attempt, seconds=dict(self.rank.timer.seconds()))
            self.rank.close()

    def _sum_up(self) -> None:
        """Print a summary of the run."""
        if self.status is None or not self.is_summed_up:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print("\n".join(run_summary(self.folder, self.rank.timer.seconds(), memory_gb=peak)), flush=True)

    def _train(self) -> int:
        self.rank.timer.enter("setup")
        trial = self.config.trainer.is_trial
        facts, options = recipe_fingerprint(self.config), self.options

        def ours(settings: CheckpointSettings) -> list[Callback]:
            saver = CheckpointSaver(
                settings,
                self.folder.checkpoints,
                facts,
                request=self._wish,
                on_saved=self._saved,
                allow_changed_data=options.allow_changed_data,
            )
            savers = [] if trial else [saver]
            return [self.recorder, RunSummary(), ProgressLine(self.recorder), KeepMemory(), *savers]

        checkpoint_io = FolderCheckpointIO(facts, trusted=options.trust_checkpoint)
        context = RunContext(options.trust_remote_code, self.begun.checkpoint, stays_on_device=True)
        cli = build_trainer(self.config, self.folder.path, ours, checkpoint_io, context, self.environment)
        module, data, trainer = cli.model, cli.datamodule, cli.trainer
        if self.begun.checkpoint is not None:
            check_fixed_options(self.begun.checkpoint, facts, module.fixed_on_resume)
            check_limits(self.begun.checkpoint, trainer.max_epochs)
        disable_signal_handlers(trainer)
        with SamplesWriter(self.folder.samples) as samples:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's connector
                if isinstance(callback, GenerateSamples):
                    callback.write = samples.write
            self.rank.timer.enter("data")
            trainer.fit(module, data, ckpt_path=self.begun.checkpoint)
        if not trial:
            self.rank.activity.begin("export")
            self.rank.timer.enter("export")
            module.export(self.folder.export, data.tokenizer)
        if self.status is not None:
            self.status.set_status("finished", step=trainer.global_step, exit_code=0)
        return ExitCode.DONE

    def _wish(self) -> SaveRequest:
        return self.stop_requests.poll(self.rank, self._stopping)

    def _stopping(self) -> None:
        if self.status is not None:
            self.status.set_status("stopping")

    def _saved(self, step: int, path: Path) -> None:
        if self.status is not None:
            self.status.event("checkpoint", step=step, path=path.name)

    def _failed(self, error: BaseException) -> int:
        """Write how the run ended and return the exit code."""
        step = self.rank.activity.step
        if isinstance(error, StopRun):
            self._stopped(error, step)
            return error.exit_code
        code: int = ExitCode.FAILED
        if isinstance(error, HubError) and (step == 0 or error.exit_code != ExitCode.WRONG_INPUT):
            code = error.exit_code  # a mistake of the user that is found after the first step is a failed run
        if isinstance(error, HardStop):
            code = ExitCode.HARD_STOP
        record = self.rank.record_error(error)
        if self.status is not None:
            reason = str(error) or type(error).__name__
            self.status.set_status("failed", reason=reason, step=step, exit_code=int(code), error=record)
        return code

    def _stopped(self, error: StopRun, step: int) -> None:
        if self.status is None:
            return
        state = self.stop_requests.ends_as
        self.status.set_status(state, reason=error.message, step=step, exit_code=int(error.exit_code))
        if self.stop_requests.accepted == RequestKind.REQUEUE and (outcome := requeue(os.environ)):
            self.status.event("requeue", outcome=outcome)
            print(outcome, file=sys.stderr)


def build_trainer(
    config: ResolvedConfig,
    root: Path | None = None,
    callbacks: Callable[[CheckpointSettings], Sequence[Callback]] = lambda settings: (),
    checkpoint_io: FolderCheckpointIO | None = None,
    context: RunContext | None = None,
    environment: HubClusterEnvironment | None = None,
) -> RecipeCLI:
    """Make module, data and trainer of a recipe; no weights or data are read."""
    _silence_warnings()
    given = {key: value for key, value in config.tree().items() if value is not None}
    if root is not None:
        given["trainer"] = {**given["trainer"], "logger": _with_folder(given["trainer"]["logger"], root / "loggers")}
    with run_context(context or RunContext()):
        return RecipeCLI(given, root=root, callbacks=callbacks, checkpoint_io=checkpoint_io, environment=environment)


def export(
    config: ResolvedConfig,
    folder: RunFolder,
    target: Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write the export of a run from its newest valid checkpoint, in one process, whatever world size wrote it.

    The model is built once without weights, and loaded one tensor at a time.

    Args:
        config: The run's recipe.
        folder: The run.
        target: The folder to write.
        merge: Whether an adapter is merged into its base.
        dtype: Of merged weights: float32 or bfloat16; that of the base if None.
        trust_remote_code: Whether Python files of the model may run.

    Returns:
        A message about the export; empty if there is nothing to say.

    Raises:
        NoCheckpointError: The run has none.
    """
    found, damaged = newest_valid(folder.checkpoints)
    if found is None:
        reason = f"there is no valid checkpoint ({damaged[0]})" if damaged else "there is no checkpoint"
        raise NoCheckpointError(reason, where=str(folder.checkpoints), remedy="train on, or start a new run")
    cli = build_trainer(config, context=RunContext(trust_remote_code, resume_from=found))
    module, data = cli.model, cli.datamodule
    module.trainer = cli.trainer
    module.build_empty()
    checkpoint = FolderCheckpointIO().load_checkpoint(found)
    module.on_load_checkpoint(checkpoint)
    state_dict.load_weights(module, checkpoint["restored"].weights)
    data.open(module.pretrained)
    if merge:
        method: CausalLMModule = module
        return method.export_merged(target, data.tokenizer, getattr(torch, dtype) if dtype else None)
    module.export(target, data.tokenizer)
    return ""


def evaluate(
    config: ResolvedConfig, verb: str, *, trust_remote_code: bool, environment: HubClusterEnvironment | None = None
) -> dict[str, float]:
    """Run Lightning's validation or test loop and return its metrics, which are the same on every rank."""
    cli = build_trainer(config, context=RunContext(trust_remote_code), environment=environment)
    loop = cli.trainer.validate if verb == "validate" else cli.trainer.test
    loop(cli.model, cli.datamodule, verbose=False)
    if not cli.trainer.callback_metrics:
        remedy = "name a file, or a share of the rows of train"
        raise ConfigError("there is no validation data", where="data.init_args.val", remedy=remedy)
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def predict(
    config: ResolvedConfig, *, trust_remote_code: bool, environment: HubClusterEnvironment | None = None
) -> list[dict[str, Any]]:
    """Complete the prompts of ``data.predict``; return prompts with completions, in order."""
    cli = build_trainer(config, context=RunContext(trust_remote_code), environment=environment)
    batches: Any = cli.trainer.predict(cli.model, cli.datamodule)
    answers = [text for batch in batches for text in batch]
    prompts = [prompt for batch in cli.datamodule.predict_dataloader() for prompt in batch]
    return [{"messages": prompt, "completion": text} for prompt, text in zip(prompts, answers, strict=True)]


def _with_folder(logger: Any, folder: Path) -> Any:
    """Return the loggers of a recipe; those without a ``save_dir`` write to ``folder``."""
    if isinstance(logger, list):
        return [_with_folder(one, folder) for one in logger]
    if not isinstance(logger, dict) or logger.get("init_args", {}).get("save_dir", "given") is not None:
        return logger
    folder.mkdir(mode=0o700, exist_ok=True)
    return {**logger, "init_args": {**logger["init_args"], "save_dir": str(folder)}}


def _silence_warnings() -> None:
    """Silence messages of Lightning and transformers that do not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated.*")  # its successor syncs at the start
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated.*")  # peft asks for it by this name
    warnings.filterwarnings("ignore", ".*Total length of .list. across ranks is zero.*")  # no validation was asked for
    warnings.filterwarnings("ignore", ".*a tied layer is part of the adapter.*")  # all that share a weight are trained
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # what is logged is the same on every rank already
