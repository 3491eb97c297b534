"""What holds for the whole house: light verbs stay light, recipes reach typed parameters only, functions stay short."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

import lightning_hub
from lightning_hub.config.registry import CLASSES, SHOWN_AS
from lightning_hub.config.schema import SCHEMA_FILE

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "lightning", "transformers", "peft", "numpy", "jsonargparse", "datasets"}


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["runs", "list"],
        ["schema"],
        ["doctor"],
        ["fit", "--config", "nowhere.yaml"],
        ["fit", "--model", "SFT", "--model.lerning_rate", "1"],
        ["fit", "--config", "configs/sft.yaml", "--print_config"],
        ["data", "--help"],
    ],
    ids=" ".join,
)
def test_light_commands_load_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys; from lightning_hub.cli import run; code = run(sys.argv[1:]);"
        f"print('LOADED', sorted({HEAVY} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout, done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, lightning_hub; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_classes_are_those_of_recipes_and_the_base_of_methods() -> None:
    listed = [named(name) for name in CLASSES if name.startswith("lightning_hub.")]
    listed += [base for kind in listed for base in kind.__mro__ if base.__name__ in SHOWN_AS]
    for name in lightning_hub.__all__:
        if not name.startswith("__"):
            assert getattr(lightning_hub, name) in listed


def named(path: str) -> type:
    module, _, name = path.rpartition(".")
    made: type = getattr(import_module(module), name)
    return made


@pytest.mark.security("S4")
@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith("lightning_hub.")])
def test_no_parameter_that_a_recipe_reaches_is_untyped(name: str) -> None:
    owners = [owner for owner in named(name).__mro__ if owner.__module__.startswith("lightning_hub.")]
    for owner in owners:
        hints = typing.get_type_hints(owner.__init__)  # type: ignore[misc]  # of this very class
        for parameter in inspect.signature(owner).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:  # goes on to the next class, whose options are looked at
                assert not forbidden(hints[parameter.name]), f"{name}.{parameter.name}: {hints[parameter.name]}"
    assert "open" not in next(record for record in records() if record["path"] == name), "no other key passes"


def records() -> list[dict[str, object]]:
    listed: list[dict[str, object]] = json.loads(SCHEMA_FILE.read_text())["classes"]
    return listed


def forbidden(hint: object) -> bool:
    """Whether a hint lets a recipe name any object or callable."""
    if hint in (typing.Any, object, Callable, type):
        return True
    return typing.get_origin(hint) in (Callable, type) or any(forbidden(part) for part in typing.get_args(hint))


def functions() -> Iterator[tuple[str, int]]:
    for folder in ("lightning_hub", "scripts", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                    yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_no_function_is_over_90_lines() -> None:
    assert [name for name, length in functions() if length > 90] == []


def test_the_malicious_releases_are_excluded() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '"lightning>=2.6.5,!=2.6.2,!=2.6.3' in text
    pinned = (ROOT / "constraints.txt").read_text()
    assert "\nlightning==2.6.6 " in pinned
    assert "nvidia-" not in pinned
    assert pinned.index("torch==2.13.0\n") < pinned.index("aiohttp==")


def test_no_public_name_is_defined_twice() -> None:
    homes: dict[str, list[str]] = {}
    for path in sorted((ROOT / "lightning_hub").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in defined(node):
                homes.setdefault(name, []).append(str(path.relative_to(ROOT)))
    twice = {name: files for name, files in homes.items() if len(files) > 1 and not name.startswith("_")}
    entry_points = {"main"}  # of verbs, and of child processes
    assert {name: files for name, files in twice.items() if name not in entry_points} == {}


def defined(node: ast.stmt) -> list[str]:
    """Names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
