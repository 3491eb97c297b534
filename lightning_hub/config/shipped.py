"""The recipes that are part of the package, by name: ``--config sft`` is ``configs/sft.yaml``."""

from __future__ import annotations

from pathlib import Path

from lightning_hub.config.suggest import nearest
from lightning_hub.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "configs"


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name: ``sft``, ``strategy/fsdp``."""
    return {str(path.relative_to(SHIPPED).with_suffix("")): path for path in sorted(SHIPPED.rglob("*.yaml"))}


def is_shipped(name: str) -> bool:
    """Whether a word is the name of a shipped recipe."""
    recipes = shipped_recipes()
    return name in recipes or f"strategy/{name}" in recipes


def recipe_path(given: str) -> str:
    """Return the file of a value of ``--config``: an existing file, else the shipped recipe of that name.

    Raises:
        ConfigError: A plain word is neither of them.
    """
    if Path(given).exists():
        return given
    recipes = shipped_recipes()
    name = given.removeprefix("configs/").removesuffix(".yaml")
    found = recipes.get(name) or recipes.get(f"strategy/{name}")
    if found is None and "." not in given and "/" not in given:
        near = nearest(given, [shipped.rpartition("/")[2] for shipped in recipes])
        remedy = f"did you mean {near}?" if near else f"the shipped recipes are {', '.join(recipes)}"
        raise ConfigError("there is no such file, and no shipped recipe of this name", where=given, remedy=remedy)
    return str(found) if found else given


def preset_of(path: str) -> str | None:
    """Return the name of a shipped recipe from its path; None for any other file."""
    resolved = Path(path).resolve()
    return next((name for name, shipped in shipped_recipes().items() if shipped.resolve() == resolved), None)
