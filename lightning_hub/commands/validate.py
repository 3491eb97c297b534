"""``lightning-hub validate``: print the validation loss of a recipe's model as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lightning_hub.commands.recipe_arguments import settle_here, show_help
from lightning_hub.errors import ExitCode
from lightning_hub.launch.messages import LOADING, note, notice
from lightning_hub.launch.options import parse
from lightning_hub.launch.run_setup import checked


def main(argv: Sequence[str]) -> int:
    """Print ``val_loss``."""
    return evaluate_and_print("validate", argv)


def evaluate_and_print(verb: str, argv: Sequence[str]) -> int:
    """Run the validation or the test loop of Lightning, and print its metrics."""
    if show_help(verb, argv):
        return ExitCode.DONE
    command, options, _ = parse(verb, argv)
    tree = checked(command.recipe, options, note)
    place = settle_here(command.recipe, tree)
    if place.rank == 0:
        notice(LOADING)
    from lightning_hub.training.run import measure
    from lightning_hub.training.worker import together  # 4 s: torch, lightning and transformers

    with together(place, tree) as environment:
        found = measure(tree, verb, trust_remote_code=options.trust_remote_code, environment=environment)
    if place.rank == 0:
        print(json.dumps(found))
    return ExitCode.DONE
