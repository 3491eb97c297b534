"""LightningCLI as the real parser of recipes, without its own way of running things."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_hub.checkpoints.plugin import FolderCheckpointIO
from lightning_hub.checkpoints.settings import CheckpointSettings
from lightning_hub.data.module import ChatData
from lightning_hub.errors import ConfigError
from lightning_hub.methods.sft import SFT
from lightning_hub.training.options import add_options


class RecipeCLI(LightningCLI):
    """Parses a recipe and makes module, data and trainer; running them is the session's.

    Args:
        recipe: A whole recipe as plain data, or command-line arguments (for ``--help`` and ``--print_config``).
        root: Where Lightning's own callbacks and loggers may write: the run folder.
        callbacks: Makes ours, beside those of the recipe, from the ``checkpoint`` section.
        checkpoint_io: How checkpoints are written and read.
        command: The command as the user typed it, for help texts.
        show_own_flags: Whether the help also shows the flags that are not part of a recipe.
    """

    def __init__(
        self,
        recipe: dict[str, Any] | Sequence[str],
        *,
        root: Path | None = None,
        callbacks: Callable[[CheckpointSettings], Sequence[Callback]] = lambda settings: (),
        checkpoint_io: FolderCheckpointIO | None = None,
        command: str = "lightning-hub fit",
        show_own_flags: bool = False,
    ) -> None:
        self.show_own_flags = show_own_flags
        self.root = root
        self.our_callbacks = callbacks
        self.checkpoint_io = checkpoint_io
        try:
            super().__init__(
                model_class=SFT,
                datamodule_class=ChatData,
                subclass_mode_model=True,
                subclass_mode_data=True,
                run=False,
                args=recipe if isinstance(recipe, dict) else list(recipe),
                seed_everything_default=42,
                auto_configure_optimizers=False,
                save_config_callback=None,
                load_from_checkpoint_support=False,
                parser_kwargs={"prog": command, "exit_on_error": False},
            )
        except (ValueError, TypeError) as error:  # what jsonargparse raises for a recipe it does not accept
            raise ConfigError(_last_cause(str(error)), remedy=f"see `{command} --help`") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section that stands beside ``trainer``."""
        parser.add_class_arguments(CheckpointSettings, "checkpoint")
        if self.show_own_flags:
            add_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given, never ``sys.argv``, which belongs to the command as a whole."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with our callbacks and checkpoint format, and a default that ends."""
        given = self.config_init["trainer"]
        if given["max_epochs"] is None and given["max_steps"] == -1 and given["max_time"] is None:
            kwargs["max_epochs"] = 1
        bars = [callback for callback in given["callbacks"] or [] if isinstance(callback, ProgressBar)]
        return super().instantiate_trainer(
            default_root_dir=self.root,
            plugins=[self.checkpoint_io] if self.checkpoint_io else None,
            logger=given["logger"] or False,
            enable_progress_bar=bool(bars),
            enable_model_summary=bool(given["enable_model_summary"]),
            num_sanity_val_steps=given["num_sanity_val_steps"] or 0,
            callbacks=[*(given["callbacks"] or []), *self.our_callbacks(self.config_init["checkpoint"])],
            **kwargs,
        )


def _last_cause(message: str) -> str:
    """Return the sentence of a parser's message that names the fault, without usage and alternatives tried."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "the recipe cannot be read"
