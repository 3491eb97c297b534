"""The flags of training commands that are not part of a recipe."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lightning_hub.config.command import Command, explain_flag, parse_command
from lightning_hub.errors import ConfigError
from lightning_hub.launch.arguments import TRUST_HELP


@dataclass(frozen=True)
class RunOptions:
    """The run folder, the checkpoint to resume from, and what the user allows.

    Attributes:
        run_dir: Exactly this run folder.
        runs_root: Where new run folders are made.
        run_name: The first part of a new folder's name.
        resume: auto, must, never, or the path of a checkpoint.
        allow_changed_data: Whether a resume may find other data or batch settings.
        trust_checkpoint: Whether a checkpoint without a manifest may be resumed from.
        trust_remote_code: Whether Python files of the model may run.
        allow_class: Prefixes of further classes that a recipe may name.
        print_config: Whether to print the whole recipe instead of running it.
    """

    run_dir: Path | None = None
    runs_root: Path | None = None
    run_name: str | None = None
    resume: str = "never"
    allow_changed_data: bool = False
    trust_checkpoint: bool = False
    trust_remote_code: bool = False
    allow_class: tuple[str, ...] = ()
    print_config: bool = False

    def permissions(self) -> list[str]:
        """Return the flags that only a command line may give, for the ranks of this run."""
        classes = [word for prefix in self.allow_class for word in ("--allow-class", prefix)]
        allowed = {
            "--allow-changed-data": self.allow_changed_data,
            "--trust-checkpoint": self.trust_checkpoint,
            "--trust-remote-code": self.trust_remote_code,
        }
        return [*classes, *(flag for flag, given in allowed.items() if given)]


_SWITCH: dict[str, Any] = {"action": "store_true"}


class _Parser(ArgumentParser):
    """A parser whose errors are `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, remedy=f"see {self.prog} --help")


_OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--run-dir", "use exactly this run folder; it is made if absent", {}),
    ("--runs-root", "make run folders here (default: runs, or LIGHTNING_HUB_RUNS)", {}),
    ("--run-name", "first part of the run folder's name", {}),
    ("--resume", "auto, must, never (default) or the path of a checkpoint", {"default": "never"}),
    ("--allow-changed-data", "resume although data, tokenizer or batch settings have changed", _SWITCH),
    ("--trust-checkpoint", "resume from a folder without a manifest of ours; no code in it is run", _SWITCH),
    (
        "--allow-class",
        "allow classes below this prefix in a recipe; may be repeated",
        {"action": "append", "default": []},
    ),
    ("--trust-remote-code", TRUST_HELP, _SWITCH),
    ("--print_config", "print the whole recipe and stop", _SWITCH),
)
"""The flags of verbs that take a recipe: name, help, and what argparse is given for it."""

VALUED = tuple(flag for flag, _, how in _OPTIONS if how is not _SWITCH)
"""Flags that take a value."""

FLAGS = (*((flag, text) for flag, text, _ in _OPTIONS), ("--debug", "show the traceback of an error"))
"""Flags with their help; ``--debug`` is taken by the command line itself."""


def parse(verb: str, argv: Sequence[str], extra: Sequence[str] = ()) -> tuple[Command, RunOptions, Namespace]:
    """Read a command line.

    Args:
        verb: The verb.
        argv: The arguments after it.
        extra: Further flags that take a value.

    Returns:
        The recipe part, the options, and all flags as argparse has them (for the extra ones).
    """
    command = parse_command(argv, valued=(*VALUED, *extra))
    parser = _Parser(prog=f"lightning-hub {verb}", add_help=False, allow_abbrev=False)
    for flag, _, how in _OPTIONS:
        parser.add_argument(flag, **how)
    for flag in extra:
        parser.add_argument(flag)
    given, unknown = parser.parse_known_args(list(command.rest))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise explain_flag(unknown[0], [*flags, "--config"])
    options = RunOptions(
        run_dir=Path(given.run_dir) if given.run_dir else None,
        runs_root=Path(given.runs_root) if given.runs_root else None,
        run_name=_run_name(given.run_name),
        resume=given.resume,
        allow_changed_data=given.allow_changed_data,
        trust_checkpoint=given.trust_checkpoint,
        trust_remote_code=given.trust_remote_code,
        allow_class=tuple(given.allow_class),
        print_config=given.print_config,
    )
    return command, options, given


def _run_name(given: str | None) -> str | None:
    """Return a name in lower case, as run folders have it."""
    if given is not None and given != given.lower():
        print(f"note: the name of the run is written in small letters: {given.lower()}", file=sys.stderr)
    return given.lower() if given is not None else None
