"""Make the paths of a recipe absolute, so that the stored recipe of a run works from every working folder."""

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
"""Options of a section or a callback that can be the path of an input; some can also be a hub id or a keyword."""

OUTPUT_PATHS = ("default_root_dir", "dirpath", "save_dir")
"""Options of the trainer, its callbacks and loggers that are paths of output folders."""

_TEMPLATES = Path(__file__).parents[1] / "data" / "masking" / "templates"


def with_absolute_paths(tree: dict[str, YamlValue], kept: YamlValue = None) -> dict[str, YamlValue]:
    """Return a recipe whose local paths are absolute. An input that does not exist as a path (a hub id) stays as it is.

    Args:
        tree: A complete recipe, with its defaults.
        kept: The stored recipe of the run. Its texts stay as they are, because the hashes of the data include them.
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
    """Change a path, each path of a list, the ``path`` of a source with a weight, or each value of a mapping."""
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
        if (_TEMPLATES / f"{text}.jinja").is_file():  # the name of a built-in template has priority over a file
            return False
        path = Path(text).expanduser()
        return path.exists() or (glob.has_magic(text) and bool(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    except (OSError, RuntimeError):  # the text is too long for a path, or there is no home folder
        return False


def _absolute(text: str) -> str:
    return os.path.abspath(Path(text).expanduser())  # noqa: PTH100  unlike resolve, it keeps symbolic links


def _texts(value: YamlValue) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return [text for child in children for text in _texts(child)]
