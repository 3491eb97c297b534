"""Prompts to answer, from a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

from lightning_hub.errors import DataError

Prompt: TypeAlias = list[dict[str, str]]
"""A conversation that ends with a turn to answer."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt a line: ``{"prompt": "..."}`` or ``{"messages": [...]}``; a last assistant turn is left out.

    Raises:
        DataError: The file or a line cannot be used, with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompts ({error})", where=str(path), remedy="give a UTF-8 file") from error
    prompts = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError("the file holds no prompt", where=str(path), remedy='write lines of {"prompt": "..."}')
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    remedy = 'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"no JSON ({error})", where=where, remedy=remedy) from error
    match row:
        case {"prompt": str(text)}:
            return [{"role": "user", "content": text}]
        case {"messages": [*messages]} if messages and all(_is_message(message) for message in messages):
            return messages[:-1] if messages[-1]["role"] == "assistant" and len(messages) > 1 else messages
    raise DataError("no prompt in this line", where=where, remedy=remedy)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
