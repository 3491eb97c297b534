"""Runs a miniature with eager attention, one document a forward, and compares other ways to run it with this."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.ops.batch import PackedSequence
from lightning_hub.ops.loss import CausalLMLoss, ModelCapabilities, accepted_by, inputs_of
from lightning_hub.ops.miniature import NoMiniatureError, build
from lightning_hub.ops.small_sizes import VOCABULARY

PROOF_TOLERANCE = 1e-4
"""Largest relative difference of losses, logits and gradients that float32 rounding can explain."""

POWER = 100
"""A leak between documents must change logits by at least this many times the tolerance; else a proof is impossible."""

LENGTHS = (11, 7, 14)
"""Numbers of tokens of the documents of a proof: longer than the windows and chunks of a miniature."""


class NotProvenError(RuntimeError):
    """A way to run a model gives other numbers than its eager attention, one document a forward."""


@dataclass(frozen=True)
class Reference:
    """The numbers of a miniature with eager attention, one document a forward.

    Attributes:
        config: The configuration of the miniature.
        model: The miniature.
        documents: Its documents, ids of shape ``(length,)``.
        logits: Logits of all documents, float32, shape ``(tokens, vocabulary)``.
        loss: Summed cross-entropy over all documents.
        evaluated: The same sum in evaluation mode, in which models may compute in another way.
        gradients: Gradients of ``loss`` by name of the parameter; zeros if a parameter has none.
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


def reference_of(kind: type[PreTrainedModel], small: PretrainedConfig) -> Reference:
    """Run the documents one by one with eager attention.

    The order of the forwards is the same as in a comparison: some rotary embeddings depend on the longest document
    of all earlier forwards.

    Raises:
        NoMiniatureError: The miniature cannot be run.
        ConfigError: The logits are random, or depend on later tokens.
    """
    documents = _documents()
    try:
        for is_training in (True, False):
            model, again = (
                build(kind, small, "eager").train(is_training),
                build(kind, small, "eager").train(is_training),
            )
            logits = _logits(model, documents, grad=True)
            torch.manual_seed(1)  # not the seed of the first forward
            if logits.equal(_logits(again, documents)):
                break
        else:
            raise ConfigError(
                "the model's logits are random: two forwards of the same tokens give different numbers",
                where="model.init_args.model",
                remedy="use another model",
            )
        loss = _sum_of_losses(logits, documents)
        loss.backward()
        evaluated = _sum_of_losses(_logits(model.eval(), documents), documents)
        model.train(is_training)
    except ConfigError:
        raise
    except Exception as error:  # any model class can raise any error here
        raise NoMiniatureError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    check_causal(model, documents[-1], logits.detach()[-LENGTHS[-1] :])
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
    """Return the largest difference, relative to the largest deviation of ``expected`` from its mean."""
    scale = (expected - expected.mean()).abs().max().clamp_min(1e-30)
    return float((found - expected).abs().max() / scale)


def _adds_to_loss(model: PreTrainedModel, ids: Tensor, logits: Tensor) -> bool:
    """Return whether the model's own loss is more than the cross-entropy of its logits."""
    try:
        with torch.no_grad():
            own = model(input_ids=ids.unsqueeze(0), labels=ids.unsqueeze(0), **accepted_by(model, use_cache=False)).loss
    except Exception:  # the model does not compute a loss
        return False
    return own is not None and abs(float(own) - float(_loss(logits, ids)) / (len(ids) - 1)) > 1e-3


def try_itself(model: PreTrainedModel) -> None:
    """Run the full model on short documents.

    Raises:
        ConfigError: It fails, or its logits depend on later tokens.
    """
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
            remedy="check that its configuration is complete, or use another model",
        ) from error
    tolerance = 10 * PROOF_TOLERANCE if model.dtype == torch.float32 else 0.02
    check_causal(model, documents[-1], logits[-LENGTHS[-1] :], tolerance)
    model.train(training)


def check_causal(model: PreTrainedModel, ids: Tensor, before: Tensor, tolerance: float = PROOF_TOLERANCE) -> None:
    """Reject a model in which a later token changes an earlier logit."""
    for position in (len(ids) - 1, len(ids) // 2):
        changed = ids.clone()
        changed[position] = 3 + (ids[position] + 1) % (VOCABULARY - 16)
        difference = _difference(_logits(model, [changed])[:position], before[:position])
        if difference > tolerance:
            raise ConfigError(
                f"the model is not causal: its logits depend on later tokens (they change by {difference:.0e})",
                where="model.init_args.model",
                remedy="use a causal language model; some configurations need is_decoder: true",
            )


def compare(reference: Reference, capabilities: ModelCapabilities, device: torch.device | None) -> None:
    """Compare a way to run the model with the reference.

    Args:
        reference: The numbers of the eager attention, one document a forward.
        capabilities: The way to run it.
        device: The device of the training, for kernels that a CPU does not have.

    Raises:
        NotProvenError: Logits, loss or gradients differ.
    """
    is_half = capabilities.attention.startswith("flash_attention")  # these kernels support half precision only
    needs_device = is_half or (
        capabilities.attention == "flex_attention" and device is not None and device.type == "cuda"
    )
    at = device if needs_device and device is not None else torch.device("cpu")
    dtype = torch.bfloat16 if is_half else torch.float32
    limit, power = PROOF_TOLERANCE, POWER
    if is_half:
        plain = _differences(
            reference, ModelCapabilities("eager", has_linear_head=False, isolates_documents=False), at, dtype
        )
        limit, power = 2 * max(plain.values()), 5
    if capabilities.isolates_documents and capabilities.max_document_length is None and reference.leak < power * limit:
        raise NotProvenError("a leak between documents would not be visible in the logits")
    for what, off in _differences(reference, capabilities, at, dtype).items():
        if not off <= limit:
            raise NotProvenError(f"{what} off by {off:.0e}")


def _differences(
    reference: Reference, capabilities: ModelCapabilities, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Return the relative differences from the reference, each under the words for it in an error."""
    model = build(type(reference.model), reference.config, capabilities.attention)  # from the same seed
    nn.Module.to(model, device=device, dtype=dtype)  # the types of its own `to` are wrong
    model.train(reference.model.training)
    row = PackedSequence.pack([(ids, ids) for ids in reference.documents]).to(device)
    found: dict[str, float] = {}
    if capabilities.isolates_documents and capabilities.max_document_length is None:
        with torch.no_grad():
            logits = model(**inputs_of(model, row)).logits[0].float().cpu()
        found["logits are"] = _difference(logits, reference.logits)
    head = CausalLMLoss(model, capabilities=capabilities)
    loss = head(row)
    loss.backward()
    found["the loss is"] = float((loss.detach().cpu() - reference.loss).abs() / reference.loss)
    with torch.no_grad():
        model.eval()
        found["the loss in evaluation is"] = float((head(row).cpu() - reference.evaluated).abs() / reference.evaluated)
    name, off = _worst(_gradients(model), reference.gradients)
    found[f"the gradient of {name} is"] = off
    if capabilities.has_linear_head and not ends_in_linear_head(model):
        found["what a linear head would give is"] = float("inf")
    return found


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """Return the parameter whose gradient differs most, and the relative difference.

    It is relative to the largest element of that gradient plus 1 % of the largest of all gradients, so that gradients
    that are only rounding do not count.
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

    A hook replaces the output of the head with large known numbers. A cap or a scale after the head would change them,
    also if the logits of the model are small.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not has_plain_head(model) or model.base_model is model:
        return False
    seen: list[Tensor] = []

    def mark(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append(inputs[0])
        return torch.linspace(-1e4, 1e4, output.numel(), dtype=output.dtype, device=output.device).view_as(output)

    ids = torch.arange(3, 6, device=head.weight.device)
    row = PackedSequence.pack([(ids, ids)]).to(head.weight.device)
    inputs = inputs_of(model, row)
    hidden = model.base_model(**inputs).last_hidden_state
    handle = head.register_forward_hook(mark)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    expected = mark(head, (hidden,), logits)
    return torch.equal(seen[0], hidden) and torch.equal(logits, expected)


def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether the output layer is torch's own linear one, without forward hooks."""
    head = model.get_output_embeddings()
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not head._forward_hooks
