"""The ``lightning-hub`` command: finds the module of a subcommand in ``commands/`` and runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module

from lightning_hub import __version__
from lightning_hub.errors import ConfigError, ExitCode, HubError, is_disk_trouble


@dataclass(frozen=True)
class Verb:
    """One subcommand.

    Attributes:
        name: Its name on the command line.
        summary: What it does, for the help.
    """

    name: str
    summary: str

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the module of the subcommand and return its ``main``.

        ``main`` takes the arguments and returns an exit code.
        """
        main: Callable[[Sequence[str]], int] = import_module(f"lightning_hub.commands.{self.name}").main
        return main


VERBS = (
    Verb("demo", "fine-tune the embedded model: no download, no GPU, a minute"),
    Verb("fit", "train what a recipe describes"),
    Verb("validate", "compute the validation loss of a recipe's model"),
    Verb("test", "the same under the name test_loss"),
    Verb("predict", "answer a file of prompts, as JSON lines"),
    Verb("data", "show what the model will see, token by token"),
    Verb("runs", "list, show, follow, resume, stop or delete runs"),
    Verb("export", "write a run's result as a plain Hugging Face folder"),
    Verb("chat", "talk to a run's result or to a model folder"),
    Verb("doctor", "look at this machine, and prove that its numbers are right"),
    Verb("schema", "print the catalogue of options as JSON"),
)


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    A user error is printed as one message on standard error. With ``--debug`` the traceback is printed too.
    """
    debug = "--debug" in argv
    words = [word for word in argv if word != "--debug"]
    try:
        code = int(_dispatch(words))
        sys.stdout.flush()  # here, so that the handlers below report a full disk
        return code
    except HubError as error:
        if debug:
            raise
        return _report(f"{error.label}: {error}", error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.HARD_STOP)
    except BrokenPipeError:  # the reader of our output has ended, as in `... | head`
        _drop_output()
        return int(ExitCode.DONE)
    except Exception as error:
        if debug or not is_disk_trouble(error):
            raise
        _drop_output()
        remedy = "free some space, or write elsewhere"
        return _report(f"error: cannot write to the disk: {error}; {remedy}", ExitCode.FAILED)


def _report(text: str, code: ExitCode) -> int:
    """Print how a command ends, if standard error can be written, and return the exit code."""
    with suppress(OSError):
        print(text, file=sys.stderr)
    return int(code)


def _drop_output() -> None:
    """Redirect standard output to ``/dev/null``. Otherwise its last flush fails again when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return ExitCode.DONE
    if words[0] in ("-V", "--version"):
        print(f"lightning-hub {__version__}")
        return ExitCode.DONE
    verbs = {verb.name: verb for verb in VERBS}
    verb = verbs.get(words[0])
    if verb is None:
        from lightning_hub.config.shipped import shipped_recipes  # 0.03 s with the next line: only for an error
        from lightning_hub.config.suggest import nearest

        near = nearest(words[0], verbs)
        recipe = f" {words[0]}" if near == "fit" and words[0] in shipped_recipes() else ""
        remedy = f"did you mean {near}{recipe}?" if near else "see lightning-hub --help"
        raise ConfigError(f"no such command: {words[0]}", remedy=remedy)
    return verb.load()(words[1:])


def _help() -> str:
    width = max(len(verb.name) for verb in VERBS)
    lines = [f"  {verb.name:<{width}}  {verb.summary}" for verb in VERBS]
    return "\n".join(
        [
            "usage: lightning-hub COMMAND [...]",
            "",
            "Fine-tune language models from a terminal.",
            "",
            *lines,
            "",
            "Each command has --help; --debug shows the traceback of an error.",
            "Begin with: lightning-hub demo",
        ]
    )
