"""Every option of data preparation, checked once, with the key in each refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias, get_args

from lightning_hub.data.readers.limits import ExampleLimits
from lightning_hub.errors import ConfigError

Format: TypeAlias = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "document", "tokens"]
TrainOn: TypeAlias = Literal["assistant", "all", "last", "completion"]
OnLong: TypeAlias = Literal["error", "truncate", "drop"]
OnBad: TypeAlias = Literal["error", "skip"]

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
    weight: float = 1.0
    split: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """What is read, what is trained on, and what happens to rows that do not fit.

    Args:
        train: A path, a hub id, or a list of them, each with a weight if wanted.
        val: A path for validation, or the share of the training rows to set aside (0.02 is 2 %, chosen by ``seed``).
        format: How rows are laid out; ``auto`` recognises it from the first row of each source and says so.
        columns: Where the input names its columns differently: our name to theirs, ``{prompt: question}``.
        max_seq_len: The longest sample in tokens.
        train_on: ``assistant``: every assistant turn; ``last``: the last one; ``completion``: what follows the last
            user turn or stands in the completion column; ``all``: every token of the sample.
        on_long: Rows over ``max_seq_len``: refuse, cut at the end, or leave out. Documents are always split instead.
        on_bad: Rows that cannot be read or rendered: refuse, or leave out and count.
        expand_turns: One sample for each assistant turn, rendered as the last one, so that thoughts which a template
            removes from earlier turns are trained too.
        chat_template: A template file or the name of a built-in one; by default the tokenizer's own.
        template_options: Variables for the template, such as ``{enable_thinking: false}``.
        seed: Chooses validation rows and the rows of fractional weights.
        num_proc: Threads that tokenise at the same time; the result does not depend on it.
        max_example_mb: The largest row or document of an input, in megabytes, decompressed.
        max_example_depth: The most levels of lists and objects inside each other in one row.
    """

    train: str | Sequence[str] | Sequence[Source]
    val: str | float | None = None
    format: Format = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    max_seq_len: int = 2048
    train_on: TrainOn = "assistant"
    on_long: OnLong = "error"
    on_bad: OnBad = "error"
    expand_turns: bool = False
    chat_template: str | None = None
    template_options: Mapping[str, str | bool | int | float] = field(default_factory=dict)
    seed: int = 42
    num_proc: int = 1
    max_example_mb: int = 64
    max_example_depth: int = 1_000

    def __post_init__(self) -> None:
        """Refuse values that no later step could mend."""
        _one_of("format", self.format, get_args(Format))
        _one_of("train_on", self.train_on, get_args(TrainOn))
        _one_of("on_long", self.on_long, get_args(OnLong))
        _one_of("on_bad", self.on_bad, get_args(OnBad))
        _at_least("max_seq_len", self.max_seq_len, 2)
        _at_least("num_proc", self.num_proc, 1)
        _at_least("seed", self.seed, 0)
        _at_least("max_example_mb", self.max_example_mb, 1)
        _at_least("max_example_depth", self.max_example_depth, 1)
        for ours in self.columns:
            _one_of("columns", ours, COLUMN_NAMES)
        if self.expand_turns and self.train_on != "assistant":
            raise ConfigError(
                f"expand_turns trains each assistant turn once and does not go with train_on: {self.train_on}",
                where="data.expand_turns",
                remedy="leave train_on at assistant",
            )
        self._check_sources()

    def _check_sources(self) -> None:
        if not self.sources:
            raise ConfigError("no training data is named", where="data.train", remedy="give a file, a folder or an id")
        for source in self.sources:
            if not source.path:
                raise ConfigError("an empty path is given", where="data.train", remedy="give a file, a folder or an id")
            if not 0 < source.weight <= 1000:
                raise ConfigError(
                    f"weight {source.weight} of {source.path} is not in (0, 1000]",
                    where="data.train",
                    remedy="1 sees each row once; leave a source out instead of giving it weight 0",
                )
        if isinstance(self.val, int | float) and not 0 < self.val < 1:
            raise ConfigError(
                f"the share {self.val} is not between 0 and 1", where="data.val", remedy="0.02 sets 2 % of rows aside"
            )

    @property
    def limits(self) -> ExampleLimits:
        """How large and deep one row may be."""
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
        """The share of training rows that is set aside, or None."""
        return None if self.val is None or isinstance(self.val, str) else float(self.val)

    def identity(self) -> dict[str, object]:
        """Everything here that shapes the tokens: the settings without paths (inputs count by their bytes)."""
        shaping = asdict(self)
        for key in ("train", "val", "num_proc", "chat_template"):
            del shaping[key]
        return shaping | {"weights": [source.weight for source in self.sources], "val_share": self.val_share}


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{value!r} is not known", where=f"data.{key}", remedy=f"use one of {', '.join(allowed)}")


def _at_least(key: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{value!r} is not a whole number", where=f"data.{key}", remedy=f"give {least} or more")
