"""``lightning-hub chat``: talk to a run's result, or to any model folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hub.config.helptext import plain
from lightning_hub.errors import ConfigError, ExitCode
from lightning_hub.runs.folder import EMBEDDED_MODEL, find_run, runs_root
from lightning_hub.training.notice import LOADING, notice

if TYPE_CHECKING:
    from lightning_hub.models.chat import Chat

COMMANDS = """\
/system TEXT  set the system message, and begin again
/reset        begin again (/new does the same)
/help         this list
/exit         end (ctrl-d does the same)"""


def main(argv: Sequence[str]) -> int:
    """Answer one prompt, or one line after another until the input ends."""
    parser = argparse.ArgumentParser(prog="lightning-hub chat", description=plain(__doc__))
    parser.add_argument("run", metavar="RUN", help="a model folder, demo, a run or a hub id")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="answer this and end")
    parser.add_argument("--system", help="a system message before the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="the longest answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--runs-root", help="where runs are kept (LIGHTNING_HUB_RUNS, else runs/)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let Python files of the model run")
    given = parser.parse_args(argv)
    source = model_of(given.run, given.runs_root)
    notice(LOADING)
    from lightning_hub.models.chat import Chat  # 4 s: torch and transformers

    chat = Chat(source, system=given.system, trust_remote_code=given.trust_remote_code)
    limits = {"max_new_tokens": given.max_new_tokens, "temperature": given.temperature}
    if given.prompt is not None:
        chat.answer(given.prompt, **limits)
        return ExitCode.DONE
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"Talking to {source}. /help lists the commands, /exit ends.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return ExitCode.DONE
        if line in ("/exit", "/quit"):
            return ExitCode.DONE
        if line.startswith("/"):
            _command(chat, line)
        elif line:
            chat.answer(line, **limits)


def _command(chat: Chat, line: str) -> None:
    """Do what a line that begins with a slash asks for; it is never sent to the model."""
    word, _, text = line.partition(" ")
    if word in ("/reset", "/new", "/clear"):
        chat.begin_again()
    elif word == "/system" and text.strip():
        chat.system = text.strip()
        chat.begin_again()
    else:
        print(COMMANDS if word == "/help" else f"no such command: {word}\n{COMMANDS}")


def model_of(name: str, root: str | None) -> str:
    """Return the model that a name means: a model folder, the embedded model, a run's export, or a hub id.

    A run is named by its path, its id or a unique beginning of that; what a beginning was taken for is said.

    Raises:
        ConfigError: The name means nothing, or a run without an export.
    """
    if any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
        return name
    try:
        folder = find_run(name, runs_root(root))
    except ConfigError:
        if name == EMBEDDED_MODEL or Path(name).is_dir() or "/" in name.strip("/"):
            return name
        raise
    if not folder.export.is_dir():
        remedy = f"make one with lightning-hub export {folder.id}"
        raise ConfigError("the run has no export yet", where=str(folder.path), remedy=remedy)
    if folder.id != name:
        print(f"note: {name} is the run {folder.id}", file=sys.stderr)
    return str(folder.export)
