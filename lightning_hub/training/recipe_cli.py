"""LightningCLI as the parser of recipes; it does not run anything.

jsonargparse does not leave a string as it is. Where an option accepts a class or settings, it opens a file of that name
and reads it as YAML; it parses every other string as YAML again. A recipe was parsed already, so neither may happen
here: a data file is not a recipe.
"""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_hub.checkpoints.checkpoint_io import FolderCheckpointIO
from lightning_hub.checkpoints.settings import CheckpointSettings
from lightning_hub.config.resolve import with_class_paths
from lightning_hub.data.datamodule import ChatData
from lightning_hub.errors import ConfigError, HubError
from lightning_hub.methods.causal_lm import CausalLMModule
from lightning_hub.parallel.process_group import HubClusterEnvironment
from lightning_hub.parallel.strategies import strategy_for

MAX_BRACKETS = 1_000
"""Opening brackets of one string. An option that takes no string still parses it as YAML; a deep one would crash."""


class _FinalText(str):
    """A string that is a value already: jsonargparse looks for files and YAML in plain ``str`` only."""

    __slots__ = ()

    def __copy__(self) -> _FinalText:
        return self

    def __deepcopy__(self, memo: object) -> _FinalText:
        return self


class RecipeCLI(LightningCLI):
    """Parses a recipe and makes module, data and trainer; `TrainingRun` runs them.

    Args:
        recipe: A whole recipe as plain data.
        root: Where Lightning's own callbacks and loggers may write: the run folder.
        callbacks: Makes our callbacks from the ``checkpoint`` section; they join those of the recipe.
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
        environment: HubClusterEnvironment | None = None,
    ) -> None:
        self.root = root
        self.our_callbacks = callbacks
        self.plugins = [plugin for plugin in (checkpoint_io, environment) if plugin is not None]
        self.world_size = environment.world_size() if environment else 1
        try:
            super().__init__(
                model_class=CausalLMModule,
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
        except (
            ValueError,
            TypeError,
            ImportError,
            ArgumentError,
        ) as error:  # what jsonargparse raises
            said = next((cause for cause in _chain(error) if isinstance(cause, HubError)), None)
            raise said or ConfigError(_cause(error), remedy="see lightning-hub fit --help") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section ``checkpoint``."""
        parser.add_class_arguments(CheckpointSettings, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given recipe, never ``sys.argv``."""
        set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)
        actions: list[Any] = parser._actions
        for action in actions:  # a second protection: no option may open a file
            if hasattr(action, "_enable_path"):
                action._enable_path = False
            if getattr(action, "sub_add_kwargs", None):
                action.sub_add_kwargs = {**action.sub_add_kwargs, "sub_configs": False}
        self.config = _plain_texts(parser.parse_object(_final_texts(args)))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with our callbacks and checkpoint format; without limits it trains one epoch."""
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


def _final_texts(value: Any, path: str = "") -> Any:
    """Return a recipe whose strings are final, except the names of classes."""
    if isinstance(value, dict):
        return {key: _final_texts(child, f"{path}.{key}" if path else str(key)) for key, child in value.items()}
    if isinstance(value, list):
        return [_final_texts(child, f"{path}.{index}") for index, child in enumerate(value)]
    if not isinstance(value, str) or path.endswith(".class_path"):
        return value
    if value.count("[") + value.count("{") > MAX_BRACKETS:
        raise ConfigError(f"a text with more than {MAX_BRACKETS:,} opening brackets", where=path, remedy="shorten it")
    return _FinalText(value)


def _plain_texts(value: Any) -> Any:
    """Return the parsed value with plain strings."""
    if isinstance(value, Namespace):
        kind: Callable[..., Namespace] = Namespace
        return kind(**{key: _plain_texts(child) for key, child in vars(value).items()})
    if isinstance(value, dict):
        return {_plain_texts(key): _plain_texts(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain_texts(child) for child in value)
    return str(value) if isinstance(value, _FinalText) else value


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, down to the root."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> str:
    """Return the sentence that names the fault, without the usage and the alternatives."""
    *_, root = _chain(error)
    if isinstance(root, ImportError):
        return f"the recipe names a class whose library is not installed ({' '.join(str(root).split())})"
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
