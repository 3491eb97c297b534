"""The options of data preparation, checked once. Each error names the key of the option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal, TypeAlias, get_args

from lightning_hub.config.bounds import Bounds, check_bounds
from lightning_hub.data.readers.limits import ExampleLimits
from lightning_hub.errors import ConfigError

Format: TypeAlias = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "document", "tokens"]
TrainOn: TypeAlias = Literal["assistant", "all", "last", "completion"]
OnLong: TypeAlias = Literal["error", "truncate", "drop"]
OnBad: TypeAlias = Literal["error", "skip"]

SeqLen: TypeAlias = Annotated[int, Bounds(">= 2")]
NumProc: TypeAlias = Annotated[int, Bounds(">= 1")]
Seed: TypeAlias = Annotated[int, Bounds(">= 0")]
ExampleMB: TypeAlias = Annotated[int, Bounds(">= 1, <= 2000")]
ExampleDepth: TypeAlias = Annotated[int, Bounds(">= 1, <= 1000")]

TRAIN_KEY = "data.init_args.train"
VAL_KEY = "data.init_args.val"


class InputError(ConfigError):
    """The option that names an input is wrong; ``where`` is this option."""


COLUMN_NAMES = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "system",
    "tools", "text", "input_ids", "labels", "attention_mask", "loss_mask", "completion_mask",
    "assistant_masks", "position_ids", "unmask",
)  # fmt: skip
"""Names that ``columns`` may map to a column of the input."""


@dataclass(frozen=True)
class Source:
    """One input of several.

    Args:
        path: A file, a folder, a pattern such as ``data/*.jsonl``, or a dataset id of the hub.
        weight: How often each kept row is seen in one pass: 1 once, 2 twice; 0.3 sees 30 % of the rows once, chosen
            by ``seed``; 2.3 sees every row twice and 30 % of them a third time. The number of extra rows is
            ``round(fraction * kept rows)``.
        split: The split of a saved dataset or a hub dataset.
        name: The configuration of a hub dataset.
    """

    path: str
    weight: Annotated[float, Bounds("> 0, <= 1000")] = 1.0
    split: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """The options of data preparation, checked. `ChatData` describes each of them."""

    train: str | Sequence[str] | Sequence[Source]
    val: str | float | None = None
    format: Format = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    max_seq_len: SeqLen = 2048
    train_on: TrainOn = "assistant"
    on_long: OnLong = "error"
    on_bad: OnBad = "error"
    expand_turns: bool = False
    chat_template: str | None = None
    template_options: Mapping[str, str | bool | int | float] = field(default_factory=dict)
    seed: Seed = 42
    num_proc: NumProc = 1
    max_example_mb: ExampleMB = 64
    max_example_depth: ExampleDepth = 1_000

    def __post_init__(self) -> None:
        """Refuse values that no later step could use."""
        check_bounds(DataSettings.__init__, vars(self), "data.init_args")
        _one_of("format", self.format, get_args(Format))
        _one_of("train_on", self.train_on, get_args(TrainOn))
        _one_of("on_long", self.on_long, get_args(OnLong))
        _one_of("on_bad", self.on_bad, get_args(OnBad))
        for ours in self.columns:
            _one_of("columns", ours, COLUMN_NAMES)
        if self.expand_turns and self.train_on != "assistant":
            raise ConfigError(
                f"expand_turns trains each assistant turn once and does not go with train_on: {self.train_on}",
                where="data.init_args.expand_turns",
                remedy="leave train_on at assistant",
            )
        self._check_sources()

    def _check_sources(self) -> None:
        if not self.sources:
            raise InputError("no training data is named", where=TRAIN_KEY, remedy="give a file, a folder or an id")
        for source in self.sources:
            if not source.path:
                raise InputError("an empty path is given", where=TRAIN_KEY, remedy="give a file, a folder or an id")
            if not 0 < source.weight <= 1000:
                raise ConfigError(
                    f"weight {source.weight} of {source.path} is not in (0, 1000]",
                    where=TRAIN_KEY,
                    remedy="1 uses each example once; leave a source out instead of giving it weight 0",
                )
        if isinstance(self.val, int | float) and not 0 < self.val < 1:
            raise ConfigError(
                f"the share {self.val} is not between 0 and 1",
                where=VAL_KEY,
                remedy="0.02 holds out 2 % of the examples",
            )

    @property
    def limits(self) -> ExampleLimits:
        """How large and deep one example may be."""
        return ExampleLimits(self.max_example_mb * 1_000_000, self.max_example_depth)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The training inputs as a list of sources."""
        given = [self.train] if isinstance(self.train, str) else self.train
        return tuple(Source(item) if isinstance(item, str) else item for item in given)

    @property
    def val_sources(self) -> tuple[Source, ...]:
        """The validation inputs; empty where validation is a share of training, or off."""
        return (Source(self.val),) if isinstance(self.val, str) else ()

    @property
    def val_share(self) -> float | None:
        """The share of training examples that is held out, or None."""
        return None if self.val is None or isinstance(self.val, str) else float(self.val)

    def identity(self) -> dict[str, object]:
        """The settings that shape the tokens, without paths: inputs count by their content."""
        shaping = asdict(self)
        for key in ("train", "val", "num_proc", "chat_template"):
            del shaping[key]
        return shaping | {"weights": [source.weight for source in self.sources], "val_share": self.val_share}


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{value!r} is not known", where=f"data.init_args.{key}", remedy=f"use one of {', '.join(allowed)}"
        )
