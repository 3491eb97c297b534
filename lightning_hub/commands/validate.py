"""``lightning-hub validate``: print the validation loss of a recipe's model as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lightning_hub.commands.recipe_arguments import resolve_process, show_help
from lightning_hub.errors import ExitCode
from lightning_hub.launch.messages import LOADING, print_note, print_notice
from lightning_hub.launch.options import parse
from lightning_hub.launch.run_setup import check_and_fill


def main(argv: Sequence[str]) -> int:
    """Print ``val_loss``."""
    return evaluate_and_print("validate", argv)


def evaluate_and_print(verb: str, argv: Sequence[str]) -> int:
    """Run the validation or the test loop of Lightning, and print its metrics."""
    if show_help(verb, argv):
        return ExitCode.DONE
    command, options, _ = parse(verb, argv)
    config = check_and_fill(command.recipe, options, print_note)
    process, config = resolve_process(command.recipe, config)
    if process.rank == 0:
        print_notice(LOADING)
    from lightning_hub.training.run import evaluate
    from lightning_hub.training.worker import process_group  # 4 s: torch, lightning and transformers

    with process_group(process, config) as environment:
        found = evaluate(config, verb, trust_remote_code=options.trust_remote_code, environment=environment)
    if process.rank == 0:
        print(json.dumps(found))
    return ExitCode.DONE
