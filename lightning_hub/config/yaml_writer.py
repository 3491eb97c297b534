"""Write trees as YAML. Equal trees give equal text, and YAML 1.1 and 1.2 parsers read the same values."""

from __future__ import annotations

import io
import json
import math
import re

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from lightning_hub.config.yaml_reader import KeyPath, YamlValue, scalar

_INDENT = "  "
_FLOW_WIDTH = 100
_PLAIN_TEXT = re.compile(r"[A-Za-z_/][\w./+@ -]*[\w./+@-]|[A-Za-z_/]", re.ASCII)
_WORDS_OF_YAML_1_1 = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def dump(tree: YamlValue) -> str:
    """Return the tree as YAML text.

    The order of mappings is kept. A list of plain values is on one line if it fits. Floats keep every digit and have a
    dot, so that every parser reads ``1.0e-05`` as a float.
    """
    return "\n".join(_lines(tree)) + "\n"


def _lines(value: YamlValue) -> list[str]:
    if isinstance(value, dict) and value:
        return [line for key, child in value.items() for line in _entry(f"{_text(key)}:", child)]
    if isinstance(value, list) and value:
        return [line for child in value for line in _item(child)]
    return [_flow(value)]


def _entry(head: str, child: YamlValue) -> list[str]:
    if _fits(head, child):
        return [f"{head} {_flow(child)}"]
    return [head, *(_INDENT + line for line in _lines(child))]


def _item(child: YamlValue) -> list[str]:
    if _fits("-", child):
        return [f"- {_flow(child)}"]
    first, *rest = _lines(child)
    return [f"- {first}", *(_INDENT + line for line in rest)]


def _fits(head: str, value: YamlValue) -> bool:
    if isinstance(value, dict):
        return not value
    if isinstance(value, list):
        nested = any(isinstance(item, dict) and item for item in _leaves(value))
        return not nested and len(head) + len(_flow(value)) < _FLOW_WIDTH
    return True


def _leaves(value: YamlValue) -> list[YamlValue]:
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _flow(value: YamlValue) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_flow(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(child) for child in value) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return _float(value)
    return str(value) if isinstance(value, int) else _text(value)


def _float(value: float) -> str:
    if not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = repr(value)
    mantissa, exponent, power = text.partition("e")
    return text if "." in mantissa else f"{mantissa}.0{exponent}{power}"


def _text(text: str) -> str:
    plain = _PLAIN_TEXT.fullmatch(text) and isinstance(scalar(text), str)
    if plain and text.lower() not in _WORDS_OF_YAML_1_1:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", quoted)


def edit(text: str, changes: dict[KeyPath, YamlValue]) -> str:
    """Set values in YAML text and keep its comments, order and quotes.

    Args:
        text: A recipe as the user wrote it.
        changes: New values by key path; a missing key is added at the end of its mapping.
    """
    editor = YAML(typ="rt")
    editor.preserve_quotes = True
    editor.width = 4096  # never wrap a line
    document = editor.load(text)
    root = CommentedMap() if document is None else document
    for path, value in changes.items():
        parent = root
        for key in path[:-1]:
            if isinstance(key, str) and parent.get(key) is None:
                parent[key] = CommentedMap()
            parent = parent[key]
        parent[path[-1]] = value
    out = io.StringIO()
    editor.dump(root, out)
    return out.getvalue()
