"""The verbs that train or measure: check everything that is cheap to check, then hand over to a session or to ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_hub.config.check import check
from lightning_hub.config.helptext import class_help, recipe_help
from lightning_hub.config.paths import with_absolute_paths
from lightning_hub.config.recipe import Recipe
from lightning_hub.config.resolve import fill_defaults
from lightning_hub.config.writing import dump
from lightning_hub.errors import ExitCode, HubError
from lightning_hub.launch.devices import visible_gpus
from lightning_hub.launch.place import Place, find_place
from lightning_hub.launch.ranks import Group, open_listener
from lightning_hub.launch.supervisor import rank_command, supervise
from lightning_hub.launch.topology import Topology, settle, settle_alone
from lightning_hub.runs.folder import RunFolder
from lightning_hub.runs.terminal import independent_of_terminal
from lightning_hub.runs.writer import RunWriter, StatusWriter
from lightning_hub.training.attempt import Begun, begin
from lightning_hub.training.chat_command import model_of
from lightning_hub.training.folder import run_folder, write_run
from lightning_hub.training.notice import LOADING, notice
from lightning_hub.training.options import FLAGS, Options, parse
from lightning_hub.training.resuming import newest_tree


def fit(argv: Sequence[str]) -> int:
    """``lightning-hub fit``: train what a recipe describes."""
    if show_help("fit", argv):
        return ExitCode.DONE
    command, options, _ = parse("fit", argv)
    tree = checked(command.recipe, options)
    if options.print_config:
        print(dump(tree), end="")
        return ExitCode.DONE
    return start(command.recipe, tree, options)


def start(recipe: Recipe, tree: dict[str, Any], options: Options) -> int:
    """Train: in this process, as one rank of those that a launcher has started, or in ranks that this one starts.

    A terminal that is closed meanwhile is let go, and the training goes on.

    Args:
        recipe: The recipe as given.
        tree: The same, checked, with its defaults.
        options: Where and how.
    """
    with independent_of_terminal():
        return _start(recipe, with_absolute_paths(tree, _stored(options)), options)


def _stored(options: Options) -> dict[str, Any] | None:
    """Return the recipe of the run that is gone on with."""
    if options.run_dir is None or options.resume == "never" or not RunFolder(options.run_dir).config.is_file():
        return None
    return newest_tree(RunFolder(options.run_dir))


def _start(recipe: Recipe, tree: dict[str, Any], options: Options) -> int:
    place = find_place(os.environ)
    if place is None or (place.rank == 0 and place.launcher != "fit"):  # else who started this rank has said so
        notice(LOADING)
    topology = settle(recipe, tree["trainer"], place, visible_gpus(os.environ), say=note)
    if place is None and topology.world_size > 1:
        return _start_ranks(recipe, tree, options, topology)
    if place is not None and not place.is_alone:
        from lightning_hub.training.rank import as_rank  # 4 s: torch, lightning and transformers

        return as_rank(place, recipe, tree, options)
    run = write_run(run_folder(tree, options), recipe, tree, options)
    begun = begin(run, options.resume, tree=tree, trusted=options.trust_checkpoint)
    return _told(run, lambda: train(tree, begun, run, options))


def train(tree: dict[str, Any], begun: Begun, run: StatusWriter, options: Options) -> int:
    """Train in this process alone."""
    from lightning_hub.training.session import Session  # 4 s: torch, lightning and transformers

    return Session(tree, begun, run, options=options).fit()


def _start_ranks(recipe: Recipe, tree: dict[str, Any], options: Options, topology: Topology) -> int:
    """Start the ranks on this machine and supervise them."""
    with open_listener() as listener:
        run = write_run(run_folder(tree, options), recipe, tree, options)
        port = int(listener.getsockname()[1])
        trusted, world_size = options.trust_checkpoint, topology.world_size
        begun = begin(run, options.resume, tree=tree, trusted=trusted, world_size=world_size, master_port=port)
        own = begun.folder.attempt_config(begun.attempt)
        config = own if own.is_file() else begun.folder.config
        flags = ["--resume", str(begun.checkpoint)] if begun.checkpoint else []
        argv = rank_command(config, *flags, *options.permissions())
        group = Group(begun.folder, begun.attempt, world_size, argv, listener)
        return _told(run, lambda: supervise(run, group))


def _told(run: RunWriter, work: Callable[[], int]) -> int:
    """Do the work of an attempt and close the run."""
    code: int = ExitCode.FAILED
    try:
        code = work()
    except HubError as error:
        code = error.exit_code
        raise
    finally:
        run.close(code)
    return code


def note(text: str) -> None:
    """Print a note for a person."""
    with suppress(BrokenPipeError):  # nobody reads notes: that ends no training
        print(f"note: {text}", file=sys.stderr)


def checked(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Check a recipe as far as that is possible without loading anything, and return it whole."""
    for sentence in recipe.notes:
        note(sentence)
    check(recipe, allow_classes=options.allow_class)
    return fill_defaults(recipe)


def validate(argv: Sequence[str]) -> int:
    """``lightning-hub validate``: print the validation loss as JSON."""
    return _measure("validate", argv)


def test(argv: Sequence[str]) -> int:
    """``lightning-hub test``: the same under the name ``test_loss``."""
    return _measure("test", argv)


def _measure(verb: str, argv: Sequence[str]) -> int:
    if show_help(verb, argv):
        return ExitCode.DONE
    command, options, _ = parse(verb, argv)
    tree = checked(command.recipe, options)
    place = _settle_here(command.recipe, tree)
    if place.rank == 0:
        notice(LOADING)
    from lightning_hub.training.rank import together  # 4 s: torch, lightning and transformers
    from lightning_hub.training.session import measure

    with together(place, tree) as environment:
        found = measure(tree, verb, trust_remote_code=options.trust_remote_code, environment=environment)
    if place.rank == 0:
        print(json.dumps(found))
    return ExitCode.DONE


def _settle_here(recipe: Recipe, tree: dict[str, Any]) -> Place:
    """Return the place of a process that measures: one of those that were started, or alone."""
    place = find_place(os.environ)
    if place is None or place.is_alone:
        settle_alone(tree["trainer"])
        return Place()
    settle(recipe, tree["trainer"], place, visible_gpus(os.environ))
    return place


def predict(argv: Sequence[str]) -> int:
    """``lightning-hub predict``: answer the prompts of ``data.predict`` as JSON lines."""
    if show_help("predict", argv, PREDICT_FLAGS):
        return ExitCode.DONE
    command, options, given = parse("predict", _named_model(argv), ["--to"])
    tree = checked(command.recipe, options)
    place = _settle_here(command.recipe, tree)
    if place.rank == 0:
        notice(LOADING)
    from lightning_hub.training.rank import together  # 4 s: torch, lightning and transformers
    from lightning_hub.training.session import answer

    with together(place, tree) as environment:
        lines = answer(tree, trust_remote_code=options.trust_remote_code, environment=environment)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if place.rank == 0 and given.to:
        Path(given.to).write_text(text, encoding="utf-8")
    elif place.rank == 0:
        print(text, end="")
    return ExitCode.DONE


PREDICT_FLAGS = (
    ("RUN FILE", "first of all: a run or a model, and the file of prompts, in place of a recipe"),
    ("--to", "write the answers to this file"),
)


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
    # Nothing is trained: the data class wants to be told what on all the same.
    return ["--model", "SFT", "--model.model", model, "--data", "ChatData", "--data.train", prompts,
            "--data.predict", prompts, *rest]  # fmt: skip


def show_help(verb: str, argv: Sequence[str], extra: Sequence[tuple[str, str]] = ()) -> bool:
    """Print the help of the command, or of a class (``--model.help SFT``), if it is asked for."""
    text = class_help(argv)
    if text is None and {"-h", "--help"} & set(argv):
        text = recipe_help(verb, (*FLAGS, *extra))
    if text is not None:
        print(text)
    return text is not None
