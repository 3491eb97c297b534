"""The contenders of ``benchmarks.forgetting``: ways to teach a task, from a plain model to a plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from lightning_hub.methods.osft import OSFT
from lightning_hub.methods.osft.bases import BasesCache, fill_bases
from lightning_hub.methods.osft.split import split, trained_rank
from lightning_hub.methods.targets import ALL_LINEAR, Matrix, resolve
from lightning_hub.runs.folder import default_cache_dir

NAMES = ("sft", "osft", "osft thin", "lora", "peft osf", "factors")
ORTHOGONAL = ("osft", "osft thin", "peft osf", "factors")
"""Those that promise to leave the protected directions alone."""


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Learner:
    """A model that is ready to learn a task.

    Attributes:
        model: What computes the loss; what trains in it has a gradient.
        merged: Returns the plain model that it has become.
        before_clipping: Called when the gradients are complete.
        after_step: Called when the optimizer has moved the parameters.
    """

    model: PreTrainedModel
    merged: Callable[[], PreTrainedModel]
    before_clipping: Callable[[], None] = _nothing
    after_step: Callable[[], None] = _nothing

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def learner(name: str, plain: PreTrainedModel, ratio: float) -> Learner:
    """Return a copy of a plain model that learns with a method.

    Args:
        name: One of ``NAMES``.
        plain: It stays as it is.
        ratio: Share of the singular directions that may be trained; LoRA gets the rank that trains as many numbers.
    """
    model = copy.deepcopy(plain)
    if name == "sft":
        model.requires_grad_(True)
        return Learner(model, lambda: model)
    if name == "lora":
        rank = lora_rank(plain, ratio)
        return _through_peft(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers(plain)))
    if name == "peft osf":
        return _through_peft(model, _osf(plain, ratio))
    return _factors(model, ratio) if name == "factors" else _osft(model, ratio, "thin" if "thin" in name else "full")


def targets(model: PreTrainedModel) -> list[Matrix]:
    """Return the weights that every method but full fine-tuning changes: all linear layers of the blocks."""
    return resolve(model, ALL_LINEAR)


def layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that hold the targets."""
    return [matrix.module for matrix in targets(model)]


def lora_rank(model: PreTrainedModel, ratio: float) -> int:
    """Return the rank with which LoRA trains about as many numbers as OSFT does in full."""
    trained = per_rank = 0
    for matrix in targets(model):
        short, long = sorted(matrix.shape)
        rank = trained_rank(ratio, short)
        trained += rank * max(rank, long) if short != long else rank * rank
        per_rank += short + long
    return round(trained / per_rank)


def _osft(model: PreTrainedModel, ratio: float, complement: Literal["full", "thin"]) -> Learner:
    module = OSFT("demo", unfreeze_rank_ratio=ratio, targets=ALL_LINEAR, complement=complement)
    module.choose_trainable(model)
    module.model = model
    fill_bases(list(module.sites()), BasesCache(default_cache_dir()))

    def merged() -> PreTrainedModel:
        for site in list(module.sites()):
            holder = model.get_submodule(site.matrix.module)
            parametrize.remove_parametrizations(holder, site.matrix.parameter, leave_parametrized=True)
        return model

    return Learner(model, merged)


def _through_peft(model: PreTrainedModel, config: PeftConfig) -> Learner:
    wrapped = get_peft_model(model, config)
    merge = cast("Callable[[], PreTrainedModel]", wrapped.merge_and_unload)
    return Learner(cast("PreTrainedModel", wrapped.get_base_model()), merge)


def _osf(model: PreTrainedModel, ratio: float) -> OSFConfig:
    """Its ``effective_rank`` is what is protected; each layer gets the very number of directions that OSFT protects."""
    kept: dict[str, int | float] = {}
    for matrix in targets(model):
        short = min(matrix.shape)
        kept[f"^{matrix.module.replace('.', r'[.]')}$"] = short - trained_rank(ratio, short)
    return OSFConfig(target_modules=layers(model), rank_pattern=kept)


class Factors(nn.Module):
    """The published form: a weight as frozen ``U_h S_h V_h`` plus trained ``U_l S_l V_l``."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        u, values, v = torch.linalg.svd(weight.double(), full_matrices=False)
        kept = len(values) - rank
        self.register_buffer("u_high", u[:, :kept].float())
        self.register_buffer("v_high", v[:kept].float())
        self.register_buffer("high", (u[:, :kept] * values[:kept] @ v[:kept]).float())
        self.u = nn.Parameter(u[:, kept:].float())
        self.s = nn.Parameter(values[kept:].float())
        self.v = nn.Parameter(v[kept:].float())

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the factors make up."""
        return cast("Tensor", self.high) + (self.u * self.s) @ self.v

    @torch.no_grad()
    def project(self, u: Tensor | None, v: Tensor | None) -> None:
        """Take what lies in the protected directions out of two factors, or their gradients, in place."""
        u_high, v_high = cast("Tensor", self.u_high), cast("Tensor", self.v_high)
        if u is not None and v is not None:
            u -= u_high @ (u_high.mT @ u)
            v -= (v @ v_high.mT) @ v_high


def _factors(model: PreTrainedModel, ratio: float) -> Learner:
    model.requires_grad_(False)
    made: list[tuple[nn.Module, Factors]] = []
    for matrix in targets(model):
        holder = model.get_submodule(matrix.module)
        form = Factors(cast("Tensor", holder.weight).detach(), trained_rank(ratio, min(matrix.shape)))
        parametrize.register_parametrization(holder, "weight", form, unsafe=True)
        made.append((holder, form))

    def merged() -> PreTrainedModel:
        for holder, _ in made:
            parametrize.remove_parametrizations(holder, "weight", leave_parametrized=True)
        return model

    def gradients() -> None:
        for _, form in made:
            form.project(form.u.grad, form.v.grad)

    def parameters() -> None:
        for _, form in made:
            form.project(form.u, form.v)

    return Learner(model, merged, gradients, parameters)


def leak(before: PreTrainedModel, after: PreTrainedModel, ratio: float) -> float:
    """Return the largest share, over all targets and both sides, of a change that lies in protected directions."""
    return max(_shares(before, after, targets(before), ratio))


def _shares(before: PreTrainedModel, after: PreTrainedModel, chosen: Iterable[Matrix], ratio: float) -> Iterable[float]:
    for matrix in chosen:
        start, end = (model.get_parameter(matrix.full_name).detach().double() for model in (before, after))
        parts, change = split(start, trained_rank(ratio, min(matrix.shape))), end - start
        kept = parts.protected
        for inside in (parts.u[:, :kept].mT @ change, change @ parts.v[:kept].mT):
            yield float(inside.norm() / change.norm())
