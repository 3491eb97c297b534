"""Reads prompts for generation from a file of JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias, cast

from lightning_hub.data.readers.examples import RawExample
from lightning_hub.data.readers.json_files import read_jsonl
from lightning_hub.data.readers.limits import ExampleLimits
from lightning_hub.errors import DataError

Prompt: TypeAlias = list[dict[str, str]]
"""A conversation whose last turn is to be answered."""


def read_prompts(path: Path, limits: ExampleLimits | None = None) -> list[Prompt]:
    """Read one prompt a line: ``{"prompt": "..."}`` or ``{"messages": [...]}``; a last assistant turn is left out.

    Args:
        path: The file.
        limits: How large and deep a line may be.

    Raises:
        DataError: The file or a line cannot be used, with the line.
    """
    if not path.is_file():
        raise DataError("cannot read the prompts (no such file)", where=str(path), remedy="give a file of JSON lines")
    prompts = [_prompt(example) for example in read_jsonl(path, limits or ExampleLimits())]
    if not prompts:
        raise DataError("the file holds no prompt", where=str(path), remedy='write lines of {"prompt": "..."}')
    return prompts


def _prompt(raw: RawExample) -> Prompt:
    remedy = 'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
    if raw.problem:
        raise DataError(f"no prompt ({raw.problem})", where=raw.where, remedy=remedy)
    match raw.data:
        case {"prompt": str(text)}:
            return [{"role": "user", "content": text}]
        case {"messages": [*given]} if given and all(_is_message(message) for message in given):
            messages = cast("Prompt", given)
            return messages[:-1] if messages[-1]["role"] == "assistant" and len(messages) > 1 else messages
    raise DataError("no prompt in this line", where=raw.where, remedy=remedy)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
