"""Writes an export: a Hugging Face folder, whose tensors are compared with memory before it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_hub.errors import HubError


def write_export(
    target: Path,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write weights, configuration, tokenizer, chat template and generation config to a folder.

    Args:
        target: The folder; an existing one is replaced when the new one is complete.
        model: The model whose classes write the files.
        weights: The tensors to write, by the names of the state dict.
        tokenizer: The tokenizer that made the training data, with its chat template.
        beside: Writes further files into the folder.

    Raises:
        HubError: A written tensor differs from the one in memory.
    """
    with atomic_folder(target) as building:
        model.save_pretrained(building, state_dict=dict(weights))
        _write_dtype(building, model, weights)
        tokenizer.save_pretrained(building)
        _compare(building, model, weights)
        beside(building)


def _write_dtype(folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Write the dtype of the weights to the configuration, because readers load them in that dtype."""
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1 and dtypes != {model.dtype}:
        config = deepcopy(model.config)
        (config.dtype,) = dtypes
        config.save_pretrained(folder)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder; after the context without an error, rename it to ``target`` and delete an older one.

    The temporary names are hidden: ``NAME.old`` may be a folder of the user.
    """
    building = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True, mode=0o700)
    try:
        yield building
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    for path in building.rglob("*"):  # a tokenizer with several templates writes a folder of them
        path.chmod(0o700 if path.is_dir() else 0o600)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    building.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _compare(folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Read every written tensor and compare it with memory, bit by bit.

    Some architectures are written under other names than they have in memory; those are read back as a model.
    """
    written: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118  # not a dict
                if name not in weights:
                    written = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
                    break
                _same(folder, name, stream.get_tensor(name), weights[name])
    for name, tensor in written.items():
        _same(folder, name, tensor, weights[name])


def _same(folder: Path, name: str, written: Tensor, memory: Tensor) -> None:
    if not written.equal(memory.cpu()):
        raise HubError(f"the written {name} differs from the one in memory", where=str(folder), remedy="export again")
