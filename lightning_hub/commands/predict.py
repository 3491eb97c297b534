"""``lightning-hub predict``: complete the prompts of a file, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from lightning_hub.commands.recipe_arguments import resolve_process, show_help
from lightning_hub.errors import ExitCode
from lightning_hub.launch.messages import LOADING, print_note, print_notice
from lightning_hub.launch.options import parse
from lightning_hub.launch.run_setup import check_and_fill
from lightning_hub.runs.model_name import model_of

PREDICT_FLAGS = (
    ("RUN FILE", "first of all: a run or a model, and the file of prompts, in place of a recipe"),
    ("--to", "write the answers to this file"),
)


def main(argv: Sequence[str]) -> int:
    """Complete the prompts of ``data.predict``."""
    if show_help("predict", argv, PREDICT_FLAGS):
        return ExitCode.DONE
    command, options, given = parse("predict", _named_model(argv), ["--to"])
    config = check_and_fill(command.recipe, options, print_note)
    process, config = resolve_process(command.recipe, config)
    if process.rank == 0:
        print_notice(LOADING)
    from lightning_hub.training.run import predict
    from lightning_hub.training.worker import process_group  # 4 s: torch, lightning and transformers

    with process_group(process, config) as environment:
        lines = predict(config, trust_remote_code=options.trust_remote_code, environment=environment)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if process.rank == 0 and given.to:
        Path(given.to).write_text(text, encoding="utf-8")
    elif process.rank == 0:
        print(text, end="")
    return ExitCode.DONE


def _named_model(argv: Sequence[str]) -> list[str]:
    """Return the arguments with ``RUN FILE`` at their beginning written as a recipe."""
    if len(argv) < 2 or any(
        word.startswith("-") or "=" in word or word.endswith((".yaml", ".yml")) for word in argv[:2]
    ):
        return list(argv)
    name, prompts, *rest = argv
    root = next((after for word, after in pairwise(rest) if word == "--runs-root"), None)
    root = root or next((word.partition("=")[2] for word in rest if word.startswith("--runs-root=")), None)
    model = model_of(name, root)
    # The data class needs training data, although nothing is trained.
    return ["--model", "SFT", "--model.model", model, "--data", "ChatData", "--data.train", prompts,
            "--data.predict", prompts, *rest]  # fmt: skip
