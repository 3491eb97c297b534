"""Bounds of a number, written once: in the annotation of the option.

``r: Annotated[int, Bounds(">= 1")] = 16`` is read by ``scripts/make_schema.py``, so the checker, the help and the JSON
Schema know it, and by `check_bounds`, which a class calls when Python code constructs it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from lightning_hub.errors import ConfigError

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_BOUND = re.compile(r"(>=|<=|>|<)\s*(-?[0-9.]+)")


@dataclass(frozen=True)
class Bounds:
    """Bounds such as ``"> 0, <= 1"``."""

    text: str

    def limits(self) -> list[tuple[str, float]]:
        """Return each bound as its sign and its limit."""
        return [(sign, float(limit)) for sign, limit in _BOUND.findall(self.text)]

    def hold(self, value: object) -> bool:
        """Return whether a value is inside the bounds; an infinite number is not, and what is not a number is."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return True
        if math.isinf(value):
            return False
        return all(_COMPARE[sign](value, limit) for sign, limit in self.limits())


def bounds_of(hint: object) -> Bounds | None:
    """Return the bounds in an annotation, also in a member of a union."""
    if get_origin(hint) is Annotated:
        return next((extra for extra in get_args(hint)[1:] if isinstance(extra, Bounds)), None)
    return next((found for found in map(bounds_of, get_args(hint)) if found is not None), None)


def check_bounds(init: Callable[..., Any], values: Mapping[str, object], section: str) -> None:
    """Refuse values outside the bounds of a signature, and what is not a whole number where one is needed.

    Args:
        init: The ``__init__`` whose annotations give the bounds.
        values: Its arguments by name.
        section: Key of the section in a recipe, as in ``data.init_args``.

    Raises:
        ConfigError: A value is outside; the error names its key and its bounds.
    """
    for name, hint in get_type_hints(init, include_extras=True).items():
        bounds = bounds_of(hint)
        if bounds is None or name not in values:
            continue
        value, key, remedy = values[name], f"{section}.{name}", f"give a number {bounds.text}"
        is_whole = get_origin(hint) is Annotated and get_args(hint)[0] is int
        if is_whole and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{value!r} is not a whole number", where=key, remedy=remedy)
        if not bounds.hold(value):
            raise ConfigError(f"{value!r} is out of range", where=key, remedy=remedy)
