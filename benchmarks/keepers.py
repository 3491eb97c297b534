"""The contenders of ``benchmarks.forgetting``: ways to teach a task, from a plain model to a plain model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from lightning_hub.methods.osft import OSFT
from lightning_hub.methods.osft.bases import BasesCache, compute_bases
from lightning_hub.methods.osft.delta_exact import Complement
from lightning_hub.methods.osft.export import merge_delta as merged_changes
from lightning_hub.methods.osft.export import write_deltas
from lightning_hub.methods.osft.inject import Parametrization
from lightning_hub.methods.osft.subspace import split_subspace, trained_rank
from lightning_hub.methods.targets import ALL_LINEAR, WeightMatrix, resolve_targets

PEER = "mini_trainer"
"""The package of the method's authors, version 0.9.0: it contends where it can be imported, and nothing needs it."""

PEERS = ("mini-trainer",) if find_spec(PEER) else ()

ORTHOGONAL = ("osft", "osft thin", "peft osf", "factors", *PEERS)
"""Those that promise to leave the protected directions alone."""

FEWER = tuple(f"{name} fewer" for name in ("peft osf", "factors", *PEERS))
"""The forms that train twice as many numbers for the same directions, with as many numbers as OSFT, in fewer."""

NAMES = ("sft", "sft targets", "lora", *ORTHOGONAL, "osft chained", *FEWER)


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Learner:
    """A model that is ready to learn a task.

    Attributes:
        model: What computes the loss; what trains in it has a gradient.
        merged: Returns the plain model that it has become.
        before_clipping: Called when the gradients are complete.
        before_step: Called when they are clipped.
        after_step: Called when the optimizer has moved the parameters.
    """

    model: PreTrainedModel
    merged: Callable[[], PreTrainedModel]
    before_clipping: Callable[[], None] = _nothing
    before_step: Callable[[], None] = _nothing
    after_step: Callable[[], None] = _nothing

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Chain:
    """The tasks that a model learns one after another, for a method that protects what the earlier ones have taught.

    Attributes:
        folder: Where the exact changes of each task are kept.
        tasks: How many there are.
    """

    folder: Path
    tasks: int

    @property
    def previous_tasks(self) -> list[str]:
        """The changes of the tasks so far, oldest first."""
        return sorted(map(str, self.folder.iterdir()))


def learner(name: str, plain: PreTrainedModel, ratio: float, chain: Chain | None = None) -> Learner:
    """Return a copy of a plain model that learns with a method.

    Args:
        name: One of ``NAMES``.
        plain: It stays as it is.
        ratio: Share of the singular directions that may be trained; LoRA gets the rank that trains as many numbers.
        chain: For ``osft chained``, which gives each task its own part of these directions.
    """
    model = copy.deepcopy(plain)
    if name in FEWER:
        name, ratio = name.removesuffix(" fewer"), fewer(plain, ratio)
    if name.startswith("sft"):
        model.requires_grad_(name == "sft")
        for matrix in targets(model):
            model.get_parameter(matrix.full_name).requires_grad_(True)
        return Learner(model, lambda: model)
    if name == "lora":
        rank = lora_rank(plain, ratio)
        return _through_peft(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers(plain)))
    if name == "peft osf":
        return _through_peft(model, _osf(plain, ratio))
    if name in PEERS:
        return _mini_trainer(model, ratio)
    form: Parametrization = "usv" if name == "factors" else "delta"
    return _osft(model, ratio, "thin" if "thin" in name else "full", form, chain if "chained" in name else None)


def targets(model: PreTrainedModel) -> list[WeightMatrix]:
    """Return the weights that every method but full fine-tuning changes: all linear layers of the blocks."""
    return resolve_targets(model, ALL_LINEAR)


def layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that hold the targets."""
    return [matrix.module for matrix in targets(model)]


def lora_rank(model: PreTrainedModel, ratio: float) -> int:
    """Return the rank with which LoRA trains about as many numbers as OSFT does in full."""
    per_rank = sum(sum(matrix.shape) for matrix in targets(model))
    return round(_numbers(model, ratio) / per_rank)


def fewer(model: PreTrainedModel, ratio: float) -> float:
    """Return the ratio with which three factors train about as many numbers as OSFT does in full with another one."""
    per_ratio = sum(min(matrix.shape) * (sum(matrix.shape) + 1) for matrix in targets(model))
    return round(_numbers(model, ratio) / per_ratio, 4)


def _numbers(model: PreTrainedModel, ratio: float) -> int:
    """Return how many numbers OSFT trains in full."""
    trained = 0
    for matrix in targets(model):
        short, long = sorted(matrix.shape)
        rank = trained_rank(ratio, short)
        trained += rank * max(rank, long) if short != long else rank * rank
    return trained


def _osft(
    model: PreTrainedModel, ratio: float, complement: Complement, form: Parametrization, chain: Chain | None
) -> Learner:
    previous_tasks = chain.previous_tasks if chain else []
    if chain:
        ratio *= (len(previous_tasks) + 1) / chain.tasks  # what earlier tasks have taken counts
    module = OSFT(
        "demo", ratio, ALL_LINEAR, complement, previous=previous_tasks, forward="merged", parametrization=form
    )
    module.choose_trainable(model)
    module.model = model
    found = list(module.parametrized_weights())
    with tempfile.TemporaryDirectory() as folder:  # weights that no run will meet again
        compute_bases(found, BasesCache(Path(folder)), module.previous_tasks)

    def merged() -> PreTrainedModel:
        if chain:
            changes = merged_changes(found, model.state_dict())
            write_deltas(chain.folder / f"{len(previous_tasks)}.safetensors", changes, {})
        for parametrized in found:
            holder = model.get_submodule(parametrized.matrix.module)
            parametrize.remove_parametrizations(holder, parametrized.matrix.parameter, leave_parametrized=True)
        return model

    def gradients() -> None:
        for parametrized in found:
            parametrized.delta.project_gradients()

    def parameters() -> None:
        for parametrized in found:
            parametrized.delta.project()

    return Learner(model, merged, before_clipping=gradients, after_step=parameters)


def _through_peft(model: PreTrainedModel, config: PeftConfig) -> Learner:
    wrapped = get_peft_model(model, config)
    merge = cast("Callable[[], PreTrainedModel]", wrapped.merge_and_unload)
    return Learner(cast("PreTrainedModel", wrapped.get_base_model()), merge)


def _osf(model: PreTrainedModel, ratio: float) -> OSFConfig:
    """Its ``effective_rank`` is what is protected; each layer gets the very number of directions that OSFT protects."""
    kept = {f"^{matrix.module.replace('.', r'[.]')}$": _protected(matrix, ratio) for matrix in targets(model)}
    return OSFConfig(target_modules=layers(model), rank_pattern=dict(kept))


def _protected(matrix: WeightMatrix, ratio: float) -> int:
    """Return how many of the directions of a weight are protected."""
    short = min(matrix.shape)
    return short - trained_rank(ratio, short)


@contextmanager
def _quiet() -> Iterator[None]:
    """Swallow what somebody else's code tells about its progress."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def _mini_trainer(model: PreTrainedModel, ratio: float) -> Learner:
    """Return its own model and projections, which its optimizer wrapper calls around each step.

    By itself it would train all other parameters as well, without constraint; here they stay, as in the other forms.
    """
    kept = {matrix.full_name: _protected(matrix, ratio) for matrix in targets(model)}
    theirs: Any = import_module(f"{PEER}.osft_utils")
    with _quiet():
        made = theirs.create_osft_model_class(type(model))(
            model.config, osft_config=kept, initialize_osft=False, output_dtype=torch.float32
        )
        made.load_state_dict(model.state_dict())
        made.requires_grad_(False)
        made.reinitialize_osft(decompose_existing_weights=True)

    def merged() -> PreTrainedModel:
        with _quiet():
            model.load_state_dict(made.prepare_state_dict_for_save(made.state_dict()))
        return model

    return Learner(made, merged, before_step=made.project_gradients, after_step=made.project_parameters)


def leak(before: PreTrainedModel, after: PreTrainedModel, ratio: float) -> float:
    """Return the largest share, over all targets and both sides, of a change that lies in protected directions."""
    return max(_shares(before, after, targets(before), ratio))


def _shares(
    before: PreTrainedModel, after: PreTrainedModel, chosen: Iterable[WeightMatrix], ratio: float
) -> Iterable[float]:
    for matrix in chosen:
        start, end = (model.get_parameter(matrix.full_name).detach().double() for model in (before, after))
        parts, change = split_subspace(start, trained_rank(ratio, min(matrix.shape))), end - start
        kept = parts.protected
        for inside in (parts.u[:, :kept].mT @ change, change @ parts.v[:kept].mT):
            yield float(inside.norm() / change.norm())
