"""The verbs that train or measure: check everything that is cheap to check, then hand over to the session."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_hub.config.check import check
from lightning_hub.config.helptext import class_help, recipe_help
from lightning_hub.config.recipe import Recipe
from lightning_hub.config.resolve import fill_defaults
from lightning_hub.config.writing import dump
from lightning_hub.errors import ConfigError, ExitCode
from lightning_hub.runs.folder import RunFolder, create_run, open_run_dir, runs_root
from lightning_hub.runs.writer import NewRun, RunWriter
from lightning_hub.training.options import FLAGS, Options, parse
from lightning_hub.training.processes import require_one_process


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
    """Make or open the run folder and train in it.

    Args:
        recipe: The recipe as given.
        tree: The same, checked, with its defaults.
        options: Where and how.
    """
    writer = write_run(_folder(tree, options), recipe, tree, options)
    from lightning_hub.training.session import Session  # 4 s: torch, lightning and transformers

    allowed = {name: getattr(options, name) for name in ("trust_remote_code", "allow_changed_data", "trust_checkpoint")}
    code = Session(tree, writer, resume=options.resume, **allowed).fit()
    if code == ExitCode.DONE and writer.folder.export.is_dir():
        print(f"run    {writer.folder.path}\nexport {writer.folder.export}")
    return code


def write_run(folder: RunFolder, recipe: Recipe, tree: dict[str, Any], options: Options) -> RunWriter:
    """Write what a new run is; one that exists is opened as it stands."""
    if folder.run_json.exists():
        return RunWriter(folder)
    sources = [(source.name, source.text) for source in recipe.sources]
    return RunWriter.create(folder, _new_run(tree, dump(tree), sources, options))


def checked(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Check a recipe as far as that is possible without loading anything, and return it whole."""
    for note in recipe.notes:
        print(f"note: {note}", file=sys.stderr)
    check(recipe, allow_classes=options.allow_class)
    tree: dict[str, Any] = fill_defaults(recipe)
    require_one_process(recipe, tree["trainer"])
    return tree


def _folder(tree: dict[str, Any], options: Options) -> RunFolder:
    if options.run_dir is not None:
        return open_run_dir(options.run_dir, resume=options.resume != "never")
    if options.resume != "never":
        raise ConfigError(
            f"--resume {options.resume} does not say which run", where="--resume", remedy="give --run-dir as well"
        )
    return create_run(options.run_name or _run_name(tree), runs_root(options.runs_root))


def _run_name(tree: dict[str, Any]) -> str:
    model = Path(str(tree["model"]["init_args"].get("model", "model"))).name.lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", f"{_method(tree)}-{model}")
    return name[:64].rstrip("-.")


def _method(tree: dict[str, Any]) -> str:
    return str(tree["model"]["class_path"]).rpartition(".")[2].lower()


def _new_run(tree: dict[str, Any], config: str, sources: list[tuple[str, str]], options: Options) -> NewRun:
    shipped = Path(__file__).parents[2] / "configs"
    presets = [name for name, _ in sources if Path(name).resolve().parent == shipped]
    return NewRun(
        name=_run_name(tree),
        method=_method(tree),
        model=str(tree["model"]["init_args"].get("model", "")),
        config=config,
        inputs=sources,
        plan={"nodes": [{"argv": [*sys.argv], "env": {}}], "world_size": 1, "verdict": "single"},
        preset=Path(presets[0]).stem if presets else None,
        trust_remote_code=options.trust_remote_code,
    )


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
    from lightning_hub.training.session import measure  # 4 s: torch, lightning and transformers

    print(json.dumps(measure(tree, verb, trust_remote_code=options.trust_remote_code)))
    return ExitCode.DONE


def predict(argv: Sequence[str]) -> int:
    """``lightning-hub predict``: answer the prompts of ``data.predict`` as JSON lines."""
    if show_help("predict", argv, PREDICT_FLAGS):
        return ExitCode.DONE
    command, options, given = parse("predict", argv, ["--to"])
    tree = checked(command.recipe, options)
    from lightning_hub.training.session import answer  # 4 s: torch, lightning and transformers

    lines = answer(tree, trust_remote_code=options.trust_remote_code)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if given.to:
        Path(given.to).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return ExitCode.DONE


PREDICT_FLAGS = (("--to", "write the answers to this file"),)


def show_help(verb: str, argv: Sequence[str], extra: Sequence[tuple[str, str]] = ()) -> bool:
    """Print the help of the command, or of a class (``--model.help SFT``), if it is asked for."""
    text = class_help(argv)
    if text is None and {"-h", "--help"} & set(argv):
        text = recipe_help(verb, (*FLAGS, *extra))
    if text is not None:
        print(text)
    return text is not None
