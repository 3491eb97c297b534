"""LightningCLI as the real parser of recipes, without its own way of running things."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_hub.checkpoints.plugin import FolderCheckpointIO
from lightning_hub.checkpoints.settings import CheckpointSettings
from lightning_hub.config.resolve import with_class_paths
from lightning_hub.data.module import ChatData
from lightning_hub.errors import ConfigError, HubError
from lightning_hub.methods.sft import SFT
from lightning_hub.parallel.joining import GivenPlace
from lightning_hub.parallel.strategies import strategy_for


class RecipeCLI(LightningCLI):
    """Parses a recipe and makes module, data and trainer; running them is the session's.

    Args:
        recipe: A whole recipe as plain data.
        root: Where Lightning's own callbacks and loggers may write: the run folder.
        callbacks: Makes ours, beside those of the recipe, from the ``checkpoint`` section.
        checkpoint_io: How checkpoints are written and read.
        environment: This process among the others of the run; None if it is alone.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        *,
        root: Path | None = None,
        callbacks: Callable[[CheckpointSettings], Sequence[Callback]] = lambda settings: (),
        checkpoint_io: FolderCheckpointIO | None = None,
        environment: GivenPlace | None = None,
    ) -> None:
        self.root = root
        self.our_callbacks = callbacks
        self.plugins = [plugin for plugin in (checkpoint_io, environment) if plugin is not None]
        self.world_size = environment.world_size() if environment else 1
        try:
            super().__init__(
                model_class=SFT,
                datamodule_class=ChatData,
                subclass_mode_model=True,
                subclass_mode_data=True,
                run=False,
                args=cast("dict[str, Any]", with_class_paths(recipe)),
                seed_everything_default=42,
                auto_configure_optimizers=False,
                save_config_callback=None,
                load_from_checkpoint_support=False,
                parser_kwargs={"exit_on_error": False},
            )
        except (ValueError, TypeError, ImportError) as error:  # what jsonargparse raises for what it does not accept
            said = next((cause for cause in _chain(error) if isinstance(cause, HubError)), None)
            raise said or ConfigError(_cause(error), remedy="see lightning-hub fit --help") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section that stands beside ``trainer``."""
        parser.add_class_arguments(CheckpointSettings, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given, never ``sys.argv``, which belongs to the command as a whole."""
        self.config = parser.parse_object(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with our callbacks and checkpoint format, and a default that ends."""
        given = self.config_init["trainer"]
        if given["max_epochs"] is None and given["max_steps"] == -1 and given["max_time"] is None:
            kwargs["max_epochs"] = 1
        bars = [callback for callback in given["callbacks"] or [] if isinstance(callback, ProgressBar)]
        return super().instantiate_trainer(
            default_root_dir=self.root,
            plugins=self.plugins or None,
            strategy=strategy_for(given["strategy"], self.world_size),
            logger=given["logger"] or False,
            enable_progress_bar=bool(bars),
            enable_model_summary=bool(given["enable_model_summary"]),
            num_sanity_val_steps=given["num_sanity_val_steps"] or 0,
            callbacks=[*(given["callbacks"] or []), *self.our_callbacks(self.config_init["checkpoint"])],
            **kwargs,
        )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from, down to the root."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> str:
    """Return the sentence that names the fault, without usage and the alternatives that were tried."""
    *_, root = _chain(error)
    if isinstance(root, ImportError):
        return f"the recipe names a class whose library is not installed ({' '.join(str(root).split())})"
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
