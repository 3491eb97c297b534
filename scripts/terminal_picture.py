#!/usr/bin/env python3
"""Run a command in a real terminal (tmux) and keep a picture of its screen as SVG.

usage: python scripts/terminal_picture.py docs/images/demo.svg 'lightning-hub demo' [--at SECONDS] [--size 100x30]
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text


def tmux(*words: str) -> str:
    """Call tmux on a server of its own and return what it prints."""
    return subprocess.run(["tmux", "-L", "picture", *words], check=True, capture_output=True, text=True).stdout


def screen_of(command: str, seconds: float | None, columns: int, lines: int) -> str:
    """Return the screen, colours included, after so many seconds or when the command has ended."""
    shown = f"printf '$ %s\\n' {shlex.quote(command)}; {command}; tmux -L picture wait-for -S done; sleep 60"
    tmux("new-session", "-d", "-s", "picture", "-x", str(columns), "-y", str(lines), "sh", "-c", shown)
    try:
        if seconds is None:
            tmux("wait-for", "done")
        else:
            time.sleep(seconds)
        return tmux("capture-pane", "-t", "picture", "-p", "-e")
    finally:
        tmux("kill-server")


def main() -> int:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("to", type=Path)
    parser.add_argument("command")
    parser.add_argument("--at", type=float, help="take it after so many seconds, not at the end")
    parser.add_argument("--size", default="100x30", help="columns x lines")
    given = parser.parse_args()
    columns, lines = map(int, given.size.split("x"))
    screen = screen_of(given.command, given.at, columns, lines).rstrip("\n")
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(screen))
    given.to.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(given.to), title=given.command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
