"""``lightning-hub chat``: talk to a run's result, or to any model folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_hub.errors import ConfigError, ExitCode
from lightning_hub.runs.folder import find_run, runs_root


def main(argv: Sequence[str]) -> int:
    """Answer one line after another until the input ends."""
    parser = argparse.ArgumentParser(prog="lightning-hub chat", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run, a model folder or a hub id")
    parser.add_argument("--system", help="a system message before the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="the longest answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--runs-root", help="where runs are kept (LIGHTNING_HUB_RUNS, else runs/)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let Python files of the model run")
    given = parser.parse_args(argv)
    source = _source(given.run, given.runs_root)
    from lightning_hub.models.chat import Chat  # 4 s: torch and transformers

    chat = Chat(source, system=given.system, trust_remote_code=given.trust_remote_code)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"Talking to {source}. /new begins again, ctrl-d ends.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return ExitCode.DONE
        if line == "/new":
            chat.begin_again()
        elif line:
            chat.answer(line, max_new_tokens=given.max_new_tokens, temperature=given.temperature)


def _source(name: str, root: str | None) -> str:
    """Return the model to talk to: a run's export, or what was named."""
    if any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
        return name
    try:
        folder = find_run(name, runs_root(root))
    except ConfigError:
        if Path(name).is_dir() or "/" in name.strip("/") or name == "demo":
            return name
        raise
    if not folder.export.is_dir():
        remedy = f"make one with lightning-hub export {folder.id}"
        raise ConfigError("the run has no export yet", where=str(folder.path), remedy=remedy)
    return str(folder.export)
