"""``lightning-hub chat``: talk to a run's result, or to any model folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_hub.config.help import plain_text
from lightning_hub.errors import ExitCode
from lightning_hub.launch.arguments import add_runs_root, add_trust_remote_code
from lightning_hub.launch.messages import LOADING, print_notice
from lightning_hub.runs.model_name import model_of

if TYPE_CHECKING:
    from lightning_hub.models.chat import Chat

COMMANDS = """\
/system TEXT  set the system message, and begin again
/reset        begin again (/new does the same)
/help         this list
/exit         end (ctrl-d does the same)"""


def main(argv: Sequence[str]) -> int:
    """Answer one prompt, or one line after another until the input ends."""
    parser = argparse.ArgumentParser(prog="lightning-hub chat", description=plain_text(__doc__))
    parser.add_argument("run", metavar="RUN", help="a model folder, demo, a run or a hub id")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="answer this and end")
    parser.add_argument("--system", help="a system message before the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="the longest answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add_runs_root(parser)
    add_trust_remote_code(parser)
    given = parser.parse_args(argv)
    source = model_of(given.run, given.runs_root)
    print_notice(LOADING)
    from lightning_hub.models.chat import Chat  # 4 s: torch and transformers

    chat = Chat(source, system=given.system, trust_remote_code=given.trust_remote_code)
    limits = {"max_new_tokens": given.max_new_tokens, "temperature": given.temperature}
    if given.prompt is not None:
        chat.reply(given.prompt, **limits)
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
            chat.reply(line, **limits)


def _command(chat: Chat, line: str) -> None:
    """Do what a line that begins with a slash asks for; it is never sent to the model."""
    word, _, text = line.partition(" ")
    if word in ("/reset", "/new", "/clear"):
        chat.reset()
    elif word == "/system" and text.strip():
        chat.system = text.strip()
        chat.reset()
    else:
        print(COMMANDS if word == "/help" else f"no such command: {word}\n{COMMANDS}")
