"""What a model may be asked to do with a packed row, proven by running a miniature of it.

A model is held to its own ``eager`` attention, one document a forward. Packed rows are used only if the logits, the
loss and the gradient of every parameter agree with that; else documents run one by one. Nothing is decided by a
model's name: a miniature of its class and configuration is run, in float32 on the CPU. What was found is kept on disk.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.ops.attention import PACKED
from lightning_hub.ops.loss import LossHead, Traits, accepted_by, inputs_of
from lightning_hub.ops.miniature import VOCABULARY, NoMiniatureError, build, small_config
from lightning_hub.ops.rows import Row
from lightning_hub.runs.folder import default_cache_dir

TOLERANCE = 1e-4
"""Relative difference of losses, logits and gradients that is put down to float32 rounding."""

POWER = 100
"""How many times the tolerance documents that see each other must differ, for the proof to notice a leak."""

LENGTHS = (11, 7, 14)
"""Tokens of the documents of a proof: longer than the windows and chunks of a miniature."""

KEY = "model.init_args.attn_implementation"


class NotProvenError(RuntimeError):
    """A way to run a model gives other numbers than its eager attention, one document a forward."""


@dataclass(frozen=True)
class Reference:
    """What a miniature gives with its eager attention, one document a forward.

    Attributes:
        config: The configuration of the miniature.
        model: The miniature.
        documents: Its documents, ids of shape ``(length,)``.
        logits: Those of all documents, shape ``(tokens, vocabulary)``.
        loss: Summed cross-entropy over all documents.
        evaluated: The same sum in evaluation, where models may take other ways.
        gradients: Of the first sum, by name of the parameter; zeros where there is none.
        adds_to_loss: Whether the model's own loss has further terms.
        leak: How much the logits differ if the documents are run as one.
    """

    config: PretrainedConfig
    model: PreTrainedModel
    documents: list[Tensor]
    logits: Tensor
    loss: Tensor
    evaluated: Tensor
    gradients: dict[str, Tensor]
    adds_to_loss: bool
    leak: float


_proven: dict[str, Traits] = {}


def prove(
    kind: type[PreTrainedModel], config: PretrainedConfig, wished: str, device: torch.device | None = None
) -> Traits:
    """Return the best way to run a model that gives the numbers of its eager attention.

    Args:
        kind: Its class.
        config: Its configuration.
        wished: The attention implementation that is asked for; ``packed_documents`` allows any.
        device: Where the model is to run, for kernels that need one.

    Raises:
        ConfigError: Its logits depend on later tokens, or what is asked for gives other numbers.
    """
    key = _key(kind, config, wished, device)
    if key not in _proven:
        kept = _kept(key)
        if kept is None:
            with _apart():
                kept = _find(kind, config, wished, device)
            _keep(key, kept)
        _proven[key] = kept
    return _proven[key]


def traits_of(model: PreTrainedModel) -> Traits:
    """Return what is proven about a model in memory, by its class and configuration; its attention is set to it."""
    wished = model.config._attn_implementation or "eager"
    return settle(model, prove(type(model), model.config, wished, model.device))


def settle(model: PreTrainedModel, proven: Traits) -> Traits:
    """Set a model's attention to what was proven, and return what holds for this model.

    Methods may have put something in the place of its output layer: then it makes its logits itself. A model of which
    no small one could be built is tried itself, on a few short documents.

    Raises:
        ConfigError: It fails on them, or its logits depend on later tokens.
    """
    if model.config._attn_implementation != proven.attention:
        model.set_attn_implementation(proven.attention)
    if not proven.is_proven:
        _try(model)
    return replace(proven, is_linear=proven.is_linear and has_plain_head(model))


def proven_head(model: PreTrainedModel, label_smoothing: float = 0.0) -> LossHead:
    """Return the loss head of a model in memory, used as it is proven to be right."""
    return LossHead(model, label_smoothing, traits=traits_of(model))


def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether the output layer is torch's own linear one, with nothing hooked to it."""
    head = model.get_output_embeddings()
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not head._forward_hooks


def _candidates(wished: str) -> list[tuple[str, bool]]:
    """Return attention implementations, and whether rows are packed, from the fastest on."""
    return [(wished, True), *((name, False) for name in (["sdpa", "eager"] if wished == PACKED else [wished]))]


def _find(kind: type[PreTrainedModel], config: PretrainedConfig, wished: str, device: torch.device | None) -> Traits:
    try:
        reference = _reference(kind, config)
    except NoMiniatureError as error:
        if wished not in (PACKED, "eager"):
            raise ConfigError(
                f"{wished} cannot be compared with the model's eager attention: no small model of it can be run "
                f"({error})",
                where=KEY,
                remedy="take auto or eager",
            ) from error
        reason = f"no small model of it can be run ({error})"
        return Traits("eager", is_linear=False, is_packable=False, reason=reason, is_proven=False)
    failures: list[str] = []
    for attention, is_packed in _candidates(wished):
        failure = ""
        for is_linear in (True, False):
            reason = failures[0] if failures else ""
            traits = Traits(attention, is_linear, is_packed, reason, reference.adds_to_loss)
            try:
                _compare(reference, traits, device)
            except NotProvenError as error:
                failure = str(error)
            except Exception as error:  # models fail in ways of their own when they are asked for what they cannot do
                failure = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            else:
                return traits
        failures.append(f"packed in a row, {failure}" if is_packed else f"one by one with {attention}, {failure}")
    raise ConfigError(
        f"{'no attention gives' if wished == PACKED else f'{wished} does not give'} the numbers of the model's "
        f"eager attention, one document a forward: "
        f"{'; '.join(failures)}",
        where=KEY,
        remedy="take another model" if wished == PACKED else "take auto",
    )


# ---- the reference -------------------------------------------------------------------------------------------------


def _reference(kind: type[PreTrainedModel], config: PretrainedConfig) -> Reference:
    """Run the documents one by one with eager attention.

    The order of the forwards is that of a comparison: some rotary embeddings remember the longest document so far.

    Raises:
        NoMiniatureError: It cannot be built or run.
        ConfigError: Its logits are random, or depend on later tokens.
    """
    small, documents = small_config(kind, config), _documents()
    try:
        for is_training in (True, False):
            model, again = (
                build(kind, small, "eager").train(is_training),
                build(kind, small, "eager").train(is_training),
            )
            logits = _logits(model, documents, grad=True)
            torch.manual_seed(1)  # another than that of the first
            if logits.equal(_logits(again, documents)):
                break
        else:
            raise ConfigError(
                "the model's logits are random: two forwards of the same tokens give different numbers",
                where="model.init_args.model",
                remedy="take another model",
            )
        loss = _sum_of_losses(logits, documents)
        loss.backward()
        evaluated = _sum_of_losses(_logits(model.eval(), documents), documents)
        model.train(is_training)
    except ConfigError:
        raise
    except Exception as error:  # models fail in ways of their own
        raise NoMiniatureError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    _check_causal(model, documents[-1], logits.detach()[-LENGTHS[-1] :])
    return Reference(
        config=small,
        model=model,
        documents=documents,
        logits=logits.detach(),
        loss=loss.detach(),
        evaluated=evaluated,
        gradients=_gradients(model),
        adds_to_loss=_adds_to_loss(model, documents[0], logits.detach()[: LENGTHS[0]]),
        leak=_difference(_logits(model, [torch.cat(documents)]), logits.detach()),
    )


def _documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY - 8, (length,), generator=generator) for length in LENGTHS]


def _logits(model: PreTrainedModel, documents: list[Tensor], grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(grad):
        options = accepted_by(model, use_cache=False)
        return torch.cat([model(input_ids=ids.unsqueeze(0), **options).logits[0].float() for ids in documents])


def _sum_of_losses(logits: Tensor, documents: list[Tensor]) -> Tensor:
    parts = zip(logits.split(LENGTHS), documents, strict=True)
    return torch.stack([_loss(part, ids) for part, ids in parts]).sum()


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], ids[1:], reduction="sum")


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float()
        for name, parameter in model.named_parameters()
    }


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the spread of what is expected."""
    scale = (expected - expected.mean()).abs().max().clamp_min(1e-30)
    return float((found - expected).abs().max() / scale)


def _adds_to_loss(model: PreTrainedModel, ids: Tensor, logits: Tensor) -> bool:
    """Return whether the model's own loss is more than the cross-entropy of its logits."""
    try:
        with torch.no_grad():
            own = model(input_ids=ids.unsqueeze(0), labels=ids.unsqueeze(0), **accepted_by(model, use_cache=False)).loss
    except Exception:  # it computes no loss of its own
        return False
    return own is not None and abs(float(own) - float(_loss(logits, ids)) / (len(ids) - 1)) > 1e-3


def _try(model: PreTrainedModel) -> None:
    """Run a model itself on short documents."""
    training, size = model.training, model.config.get_text_config().vocab_size
    documents = [ids.to(model.device) % size for ids in _documents()]
    try:
        for mode in (True, False):
            logits = _logits(model.train(mode), documents)
    except Exception as error:
        lengths = ", ".join(str(length) for length in LENGTHS)
        raise ConfigError(
            f"the model fails on documents of {lengths} tokens with its own eager attention "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            where="model.init_args.model",
            remedy="see whether its configuration is whole, or give another model",
        ) from error
    tolerance = 10 * TOLERANCE if model.dtype == torch.float32 else 0.02
    _check_causal(model, documents[-1], logits[-LENGTHS[-1] :], tolerance)
    model.train(training)


def _check_causal(model: PreTrainedModel, ids: Tensor, before: Tensor, tolerance: float = TOLERANCE) -> None:
    """Refuse a model in which a later token changes an earlier logit."""
    for place in (len(ids) - 1, len(ids) // 2):
        changed = ids.clone()
        changed[place] = 3 + (ids[place] + 1) % (VOCABULARY - 16)
        moved = _difference(_logits(model, [changed])[:place], before[:place])
        if moved > tolerance:
            raise ConfigError(
                f"the model is not causal: its logits depend on later tokens (they move by {moved:.0e})",
                where="model.init_args.model",
                remedy="give a causal language model; some configurations have to say is_decoder: true",
            )


# ---- the comparison ------------------------------------------------------------------------------------------------


def _compare(reference: Reference, traits: Traits, device: torch.device | None) -> None:
    """Compare a way to run the model with the reference.

    Raises:
        NotProvenError: Logits, loss or gradients differ.
    """
    model = build(type(reference.model), reference.config, traits.attention)  # from the same seed
    model.train(reference.model.training)
    tolerance = TOLERANCE
    if traits.attention == "flash_attention_2" or (traits.attention == "flex_attention" and _is_cuda(device)):
        nn.Module.to(model, device)  # kernels that a CPU does not have; its own `to` is typed as no method
        if traits.attention == "flash_attention_2":
            nn.Module.to(model, torch.bfloat16)
            tolerance = 0.05
    row = Row.pack([(ids, ids) for ids in reference.documents]).to(model.device)
    if traits.is_packable:
        if reference.leak < POWER * tolerance:
            raise NotProvenError("documents that see each other could not be told from those that do not")
        with torch.no_grad():
            logits = model(**inputs_of(model, row)).logits[0].float().cpu()
        if not (off := _difference(logits, reference.logits)) <= tolerance:
            raise NotProvenError(f"logits are off by {off:.0e}")
    head = LossHead(model, traits=traits)
    loss = head(row)
    loss.backward()
    _hold(loss, reference.loss, tolerance, "the loss")
    with torch.no_grad():
        model.eval()
        _hold(head(row), reference.evaluated, tolerance, "the loss in evaluation")
    name, off = _worst(_gradients(model), reference.gradients)
    if not off <= tolerance:
        raise NotProvenError(f"the gradient of {name} is off by {off:.0e}")
    if traits.is_linear and not ends_in_linear_head(model):
        raise NotProvenError("the head is more than one linear layer")


def _hold(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    off = float((found.detach().cpu() - expected).abs() / expected)
    if not off <= tolerance:
        raise NotProvenError(f"{what} is off by {off:.0e}")


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """Return the parameter whose gradient differs most, and by how much of its size.

    Gradients that are nothing but rounding are measured by those of the whole model.
    """
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient.numel())
    offs = {
        name: float((found[name].cpu() - gradient).abs().max() / (gradient.abs().max() + 1e-2 * largest))
        for name, gradient in expected.items()
        if gradient.numel()
    }
    return max(offs.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))


@torch.no_grad()
def ends_in_linear_head(model: PreTrainedModel) -> bool:
    """Return whether the logits are the last hidden states times the output embeddings, and nothing else.

    The head is made to answer with large marks: a cap or a scale behind it would change them, however small the
    logits of the model are.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not has_plain_head(model) or model.base_model is model:
        return False
    seen: list[Tensor] = []

    def mark(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append(inputs[0])
        return torch.linspace(-1e4, 1e4, output.numel(), dtype=output.dtype, device=output.device).view_as(output)

    ids = torch.arange(3, 6, device=head.weight.device)
    row = Row.pack([(ids, ids)]).to(head.weight.device)
    inputs = inputs_of(model, row)
    hidden = model.base_model(**inputs).last_hidden_state
    handle = head.register_forward_hook(mark)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    marks = mark(head, (hidden,), logits)
    return torch.equal(seen[0], hidden) and torch.equal(logits, marks)


# ---- what is kept --------------------------------------------------------------------------------------------------


@contextmanager
def _apart() -> Iterator[None]:
    """Leave the random state, the gradient mode and autocast of the process alone."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        yield


def _is_cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def _key(kind: type, config: PretrainedConfig, wished: str, device: torch.device | None) -> str:
    """Return a hash of all that a proof hangs on."""
    digest = hashlib.sha256()
    left_out = ("_name_or_path", "name_or_path", "transformers_version", "quantization_config", "dtype")
    plain = {name: value for name, value in config.to_dict().items() if name not in left_out}
    at = device.type if device is not None and wished in ("flash_attention_2", "flex_attention") else ""
    versions = (torch.__version__, transformers.__version__)
    said = (f"{kind.__module__}.{kind.__qualname__}", plain, wished, at, versions)
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    own = [Path(__file__).with_name(f"{name}.py") for name in ("attention", "attention_proof", "loss", "miniature")]
    source = inspect.getsourcefile(kind)
    for path in [*own, *([Path(source)] if source else [])]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:40]


def _kept(key: str) -> Traits | None:
    try:
        return Traits(**json.loads((default_cache_dir() / "proofs" / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _keep(key: str, traits: Traits) -> None:
    """Write what was found, if it can be written: else the next start finds it out again."""
    path = default_cache_dir() / "proofs" / f"{key}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(traits)))
        temporary.replace(path)
    except OSError:
        return
