"""A recipe that is checked and complete: frozen, with names for what launching and training read."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lightning_hub.config.yaml_reader import YamlValue


@dataclass(frozen=True)
class ClassConfig:
    """A class of a recipe with its options.

    Attributes:
        class_path: A short name of the catalogue, or a dotted path.
        init_args: Its options, with the defaults of the catalogue.
    """

    class_path: str
    init_args: Mapping[str, YamlValue] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last word of the class path."""
        return self.class_path.rpartition(".")[2]

    @classmethod
    def read(cls, value: YamlValue) -> ClassConfig:
        """Read a class as a recipe gives it: a name, or a mapping with ``class_path``."""
        if not isinstance(value, dict):
            return cls(str(value))
        options = value.get("init_args")
        return cls(str(value.get("class_path", "")), options if isinstance(options, dict) else {})


@dataclass(frozen=True)
class TrainerConfig:
    """The section ``trainer``; attributes for what is read outside Lightning, all options in ``options``."""

    options: Mapping[str, Any]

    @property
    def accelerator(self) -> str | None:
        """auto, cpu, gpu, cuda or mps."""
        accelerator: str | None = self.options.get("accelerator")
        return accelerator

    @property
    def strategy(self) -> ClassConfig:
        """The strategy by name, or as a class with options; ``auto`` if nothing is given."""
        return ClassConfig.read(self.options.get("strategy") or "auto")

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return int(self.options.get("num_nodes") or 1)

    @property
    def devices(self) -> int | str | list[int] | None:
        """Devices of each node: a number, their indices, or ``auto``."""
        devices: int | str | list[int] | None = self.options.get("devices")
        return devices

    @property
    def is_trial(self) -> bool:
        """Whether this is Lightning's ``fast_dev_run``, which saves and exports nothing."""
        return bool(self.options.get("fast_dev_run"))

    @property
    def limits(self) -> tuple[Any, Any, Any]:
        """What ends a training: epochs, steps, time."""
        return self.options.get("max_epochs"), self.options.get("max_steps"), self.options.get("max_time")


@dataclass(frozen=True)
class ResolvedConfig:
    """A whole recipe, checked, with the default of every option.

    It does not change: `with_trainer` returns a new one.

    Attributes:
        trainer: The section ``trainer``.
        model: The method and its options.
    """

    trainer: TrainerConfig
    model: ClassConfig
    _tree: Mapping[str, Any]

    @classmethod
    def of(cls, tree: Mapping[str, YamlValue]) -> ResolvedConfig:
        """Take a filled recipe, as plain data, which may change later without effect on this one."""
        kept: dict[str, Any] = deepcopy(dict(tree))
        trainer = TrainerConfig(MappingProxyType(kept.get("trainer") or {}))
        return cls(trainer, ClassConfig.read(kept.get("model")), MappingProxyType(kept))

    def tree(self) -> dict[str, Any]:
        """Return a copy as plain data, for a file or for the parser."""
        return deepcopy(dict(self._tree))

    def with_trainer(self, **options: Any) -> ResolvedConfig:
        """Return the recipe with other options of the trainer."""
        tree = self.tree()
        tree["trainer"] = {**(tree.get("trainer") or {}), **options}
        return ResolvedConfig.of(tree)

    @property
    def method(self) -> str:
        """The method in small letters, as run folders write it."""
        return self.model.name.lower()

    @property
    def model_source(self) -> str:
        """Folder or hub id of the model; empty if the method takes none."""
        return str(self.model.init_args.get("model") or "")
