"""Paths of a recipe made absolute, so that what a run keeps means the same in every working folder."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection
from pathlib import Path

from lightning_hub.config.yaml_reader import YamlValue

INPUT_PATHS: dict[str, tuple[str, ...]] = {
    "model": ("model", "adapter", "previous"),
    "data": ("train", "val", "predict", "chat_template"),
    "Forgetting": ("eval_also",),
    "SpikeDetection": ("exclude_batches_path",),
}
"""Options of a section, or of a callback, that may name what is read; some may also be a hub id or a word of ours."""

OUTPUT_PATHS = ("default_root_dir", "dirpath", "save_dir")
"""Options of the trainer, its callbacks and loggers that name folders to write."""

_TEMPLATES = Path(__file__).parents[1] / "data" / "masking" / "templates"


def with_absolute_paths(tree: dict[str, YamlValue], kept: YamlValue = None) -> dict[str, YamlValue]:
    """Return a recipe whose local paths are absolute. What is no path that exists (a hub id) stays as it is.

    Args:
        tree: A whole recipe, with its defaults.
        kept: What the run has stored already; its texts stay as they are, because hashes of data know their paths.
    """
    known = set(_texts(kept))

    def absolute_input(text: str) -> str:
        return text if text in known or not _exists(text) else _absolute(text)

    def absolute_output(text: str) -> str:
        return text if text in known or "://" in text else _absolute(text)

    full = dict(tree)
    for section in ("model", "data"):
        full[section] = _changed_options(tree.get(section), INPUT_PATHS[section], absolute_input)
    trainer = _changed(tree.get("trainer"), OUTPUT_PATHS, absolute_output)
    if isinstance(trainer, dict):
        for key in ("callbacks", "logger"):
            trainer[key] = _each_class(trainer.get(key), absolute_input, absolute_output)
        full["trainer"] = trainer
    return full


def _each_class(
    value: YamlValue, absolute_input: Callable[[str], str], absolute_output: Callable[[str], str]
) -> YamlValue:
    if isinstance(value, list):
        return [_each_class(item, absolute_input, absolute_output) for item in value]
    if not isinstance(value, dict):
        return value
    names = INPUT_PATHS.get(str(value.get("class_path")).rpartition(".")[2], ())
    return _changed_options(_changed_options(value, names, absolute_input), OUTPUT_PATHS, absolute_output)


def _changed_options(spec: YamlValue, names: Collection[str], change: Callable[[str], str]) -> YamlValue:
    if not isinstance(spec, dict) or "init_args" not in spec:
        return spec
    return spec | {"init_args": _changed(spec["init_args"], names, change)}


def _changed(options: YamlValue, names: Collection[str], change: Callable[[str], str]) -> YamlValue:
    if not isinstance(options, dict):
        return options
    return {name: _mapped(value, change) if name in names else value for name, value in options.items()}


def _mapped(value: YamlValue, change: Callable[[str], str]) -> YamlValue:
    """Change a path, each of a list of them, the ``path`` of a source with a weight, each of a mapping by name."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _mapped(child, change) if "path" not in value or key == "path" else child
                for key, child in value.items()}  # fmt: skip
    return value


def _exists(text: str) -> bool:
    if not text or "\0" in text:
        return False
    try:
        if (_TEMPLATES / f"{text}.jinja").is_file():  # a built-in template comes first
            return False
        path = Path(text).expanduser()
        return path.exists() or (glob.has_magic(text) and bool(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    except (OSError, RuntimeError):  # too long for a path; no home
        return False


def _absolute(text: str) -> str:
    return os.path.abspath(Path(text).expanduser())  # noqa: PTH100  links stay as they are, `..` goes


def _texts(value: YamlValue) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return [text for child in children for text in _texts(child)]
