"""``samples.jsonl``: answers of the model during a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from lightning_hub.runs.files import LineFile


class SamplesWriter:
    """Appends one line for each answer."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def write(self, step: int, prompt: str, completion: str) -> None:
        """Append an answer.

        Raises:
            OSError: The line could not be written.
        """
        line = {"step": step, "prompt": prompt, "completion": completion}
        self._file.append(json.dumps(line, ensure_ascii=False))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
