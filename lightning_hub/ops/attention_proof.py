"""Finds out how a model can run packed rows, with proofs on a miniature of it.

The reference is the ``eager`` attention of the model, with one document in each forward. Packed rows are used only if
logits, loss and the gradient of every parameter are equal to it; else documents run one by one. The name of the model
has no influence: a miniature of its class and configuration is run, in float32 on the CPU. Results are cached on disk.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.loss import CausalLMLoss, ModelCapabilities
from lightning_hub.ops.miniature import NoMiniatureError, rope_limit, small_config, without_limit
from lightning_hub.ops.reference import NotProvenError, Reference, compare, has_plain_head, reference_of, try_itself
from lightning_hub.runs.folder import default_cache_dir

ATTENTION_OPTION = "model.init_args.attn_implementation"


_proven: dict[str, ModelCapabilities] = {}


def prove_attention(
    kind: type[PreTrainedModel], config: PretrainedConfig, requested: str, device: torch.device | None = None
) -> ModelCapabilities:
    """Return the fastest way to run a model that gives the numbers of its eager attention.

    Args:
        kind: The class of the model.
        config: Its configuration.
        requested: The requested attention implementation; ``packed_documents`` allows any.
        device: The device of the training, for kernels that a CPU does not have.

    Raises:
        ConfigError: The logits depend on later tokens, or the requested implementation gives other numbers.
    """
    key = _key(kind, config, requested, device)
    if key not in _proven:
        found = _read_cached(key)
        if found is None:
            with _isolated():
                found = _find(kind, config, requested, device)
            _write_cached(key, found)
        _proven[key] = found
    return _proven[key]


def capabilities_of(model: PreTrainedModel) -> ModelCapabilities:
    """Return the proven capabilities of a model in memory, and set its attention accordingly."""
    requested = model.config._attn_implementation or "eager"
    return apply_capabilities(model, prove_attention(type(model), model.config, requested, model.device))


def apply_capabilities(model: PreTrainedModel, proven: ModelCapabilities) -> ModelCapabilities:
    """Set the attention of a model to the proven one, and return the capabilities of this model.

    A method may have replaced the output layer: then the loss is not fused with it. If no miniature could be built, the
    model itself is run on a few short documents.

    Raises:
        ConfigError: The model fails on them, or its logits depend on later tokens.
    """
    if model.config._attn_implementation != proven.attention:
        model.set_attn_implementation(proven.attention)
    if not proven.is_proven:
        try_itself(model)
    return replace(proven, has_linear_head=proven.has_linear_head and has_plain_head(model))


def proven_loss(model: PreTrainedModel, label_smoothing: float = 0.0) -> CausalLMLoss:
    """Return the loss of a model in memory, with its proven capabilities."""
    return CausalLMLoss(model, label_smoothing, capabilities=capabilities_of(model))


def _find(
    kind: type[PreTrainedModel], config: PretrainedConfig, requested: str, device: torch.device | None
) -> ModelCapabilities:
    try:
        small = small_config(kind, config)
        reference = reference_of(kind, small)
        limit = rope_limit(config.to_dict())
        shorter = None if limit is None else reference_of(kind, without_limit(small))
    except NoMiniatureError as error:
        if requested not in (PACKED, "eager"):
            raise ConfigError(
                f"{requested} cannot be compared with the model's eager attention: no small model of it can be run "
                f"({error})",
                where=ATTENTION_OPTION,
                remedy="use auto or eager",
            ) from error
        reason = f"no small model of it can be run ({error})"
        return ModelCapabilities(
            "eager", has_linear_head=False, isolates_documents=False, reason=reason, is_proven=False
        )
    failures: list[str] = []
    for candidate in _candidates(requested, limit):
        capabilities = replace(candidate, reason=failures[0] if failures else "", adds_to_loss=reference.adds_to_loss)
        failure = _failure(capabilities, reference, shorter, device)
        if failure is not None:  # the fused head may be the reason
            capabilities = replace(capabilities, has_linear_head=False)
            failure = _failure(capabilities, reference, shorter, device)
        if failure is None:
            return capabilities
        failures.append(
            f"packed in a row, {failure}"
            if candidate.isolates_documents
            else f"one by one with {candidate.attention}, {failure}"
        )
    raise ConfigError(
        f"{'no attention gives' if requested == PACKED else f'{requested} does not give'} the numbers of the model's "
        f"eager attention, one document a forward: {'; '.join(failures)}",
        where=ATTENTION_OPTION,
        remedy="use another model" if requested == PACKED else "use auto",
    )


def _candidates(requested: str, limit: int | None) -> list[ModelCapabilities]:
    """Return the possible ways to run a model, the fastest first."""
    packed = ModelCapabilities(requested, has_linear_head=True, isolates_documents=True)
    fallbacks = ["sdpa", "eager"] if requested == PACKED else [requested]
    return [
        packed,
        *([] if limit is None else [replace(packed, max_document_length=limit)]),
        *(ModelCapabilities(attention, has_linear_head=True, isolates_documents=False) for attention in fallbacks),
    ]


def _failure(
    candidate: ModelCapabilities, reference: Reference, shorter: Reference | None, device: torch.device | None
) -> str | None:
    """Return what is wrong with a way to run the model; None if nothing is wrong.

    Args:
        candidate: The way to run it.
        reference: The numbers of the eager attention.
        shorter: The same for a miniature whose documents are all below the limit of its rotary embeddings.
        device: The device of the training.
    """
    try:
        if candidate.max_document_length is None:
            compare(reference, candidate, device)
        else:
            assert shorter is not None, "a model with a limit has a reference below it"
            compare(shorter, replace(candidate, max_document_length=None), device)
            compare(reference, replace(candidate, max_document_length=0), device)
    except NotProvenError as error:
        return str(error)
    except Exception as error:  # any model class can raise any error here
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None


# ---- the cache -----------------------------------------------------------------------------------------------------


@contextmanager
def _isolated() -> Iterator[None]:
    """Compute in full float32, and restore the state of the process afterwards.

    In half precision Lightning sets the default dtype while a model is built, which would round computed buffers such
    as the rotary frequencies. Below the highest matmul precision some processors multiply in bfloat16.
    """
    before = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        ):
            yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_float32_matmul_precision(before[1])


def _key(kind: type, config: PretrainedConfig, requested: str, device: torch.device | None) -> str:
    """Return a hash of everything that a proof depends on."""
    digest = hashlib.sha256()
    left_out = ("_name_or_path", "name_or_path", "transformers_version", "quantization_config", "dtype")
    plain = {name: value for name, value in config.to_dict().items() if name not in left_out}
    at = device.type if device is not None and requested in ("flash_attention_2", "flex_attention") else ""
    versions = (torch.__version__, transformers.__version__)
    said = (f"{kind.__module__}.{kind.__qualname__}", plain, requested, at, versions)
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    own = [
        Path(__file__).with_name(f"{name}.py")
        for name in ("attention", "attention_proof", "loss", "miniature", "reference", "small_sizes")
    ]
    source = inspect.getsourcefile(kind)
    for path in [*own, *([Path(source)] if source else [])]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:40]


def _read_cached(key: str) -> ModelCapabilities | None:
    try:
        return ModelCapabilities(**json.loads((default_cache_dir() / "proofs" / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write_cached(key: str, capabilities: ModelCapabilities) -> None:
    """Write the result in one rename; errors of the disk are ignored, and the next start does the proof again."""
    path = default_cache_dir() / "proofs" / f"{key}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(capabilities)))
        temporary.replace(path)
    except OSError:
        return
