"""OSFT: the module that trains changes in the unprotected subspace of each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_hub.checkpoints.checkpoint_io import read_state
from lightning_hub.checkpoints.export import write_export
from lightning_hub.config.bounds import Bounds
from lightning_hub.errors import ConfigError
from lightning_hub.methods.causal_lm import CausalLMModule
from lightning_hub.methods.osft.bases import BasesCache, compute_bases
from lightning_hub.methods.osft.delta_exact import Complement
from lightning_hub.methods.osft.export import (
    DELTA_FILE,
    LeakageReport,
    describe_sizes,
    merge_delta,
    merged_state,
    write_changes,
)
from lightning_hub.methods.osft.importance import layer_ratios, similarities
from lightning_hub.methods.osft.inject import (
    RATIO_OPTION,
    DeltaConfig,
    Parametrization,
    ParametrizedWeight,
    cached_weights,
    inject_deltas,
    merged_name,
    parametrized_weights,
)
from lightning_hub.methods.osft.previous_tasks import PreviousTasks
from lightning_hub.methods.osft.progress import DecompositionProgress
from lightning_hub.methods.osft.summary import lines_by_shape
from lightning_hub.methods.targets import ALL_LINEAR, WeightMatrix, describe_matrices, resolve_targets, weight_matrices
from lightning_hub.ops.loss import ModelCapabilities
from lightning_hub.parallel.collectives import Ranks
from lightning_hub.parallel.dtensor import full_state_dict
from lightning_hub.parallel.fsdp import decoder_blocks
from lightning_hub.parallel.lightning_internals import trainer_of
from lightning_hub.parallel.strategies import MeshStrategy
from lightning_hub.runs.folder import default_cache_dir

LAYER_RATIOS = "osft_layer_ratios"
"""Under which name a checkpoint keeps adaptive ratios."""

PREVIOUS = "osft_previous"
"""Under which name a checkpoint keeps a hash of the earlier changes that its bases protect."""


class OSFT(CausalLMModule):
    """Orthogonal subspace fine-tuning: each weight learns along its smallest singular directions only.

    Takes SFT's options as well.

    Args:
        model: Local folder or hub id of the model to train.
        unfreeze_rank_ratio: Share of the singular directions that may be trained, the smallest ones: 0 trains none, 1
            is full fine-tuning of the targets.
        targets: Weights that learn: all-linear, groups (attention, mlp, experts, router), names or patterns; attention
            and MLP, experts included, if null.
        complement: full reaches all changes that leave the protected directions alone; thin only those within the
            trained directions of both sides: less memory, and less for weights that are not square.
        train_other: What else trains, unconstrained: none, norms, or all (embeddings and output layer too).
        previous: Exports of earlier OSFT runs, oldest first, whose changes are protected as well: what they have learnt
            is left alone. Their directions count in unfreeze_rank_ratio.
        lr_scale: Factor of the learning rate for the changes. They move a weight about ten times as far a step as
            the published factor form does at the same learning rate.
        forward: How layers apply their changes: merged into the weight, factored beside it (less memory, less to
            compute for few tokens or directions), or auto: what costs less for each weight.
        parametrization: delta is exact whatever moves it; usv is the published form of three factors, projected before
            and after each step: a reference, dearer than all else.
        fused: Whether layers that do the work of several (qkv_proj, gate_up_proj, c_attn) count as one weight for each
            of their parts, or as a whole.
        ranks: uniform gives every weight unfreeze_rank_ratio; adaptive gives more to layers that matter less, by the
            similarity of their inputs and outputs on the first rows of the data, and unfreeze_rank_ratio on average.
        rank_bounds: With adaptive ranks, the least and the largest ratio of a layer.
        **options: SFT's.
    """

    fixed_on_resume = (
        "unfreeze_rank_ratio",
        "targets",
        "complement",
        "parametrization",
        "fused",
        "ranks",
        "rank_bounds",
    )

    def __init__(
        self,
        model: str,
        unfreeze_rank_ratio: Annotated[float, Bounds(">= 0, <= 1")] = 0.25,
        targets: str | list[str] | None = None,
        complement: Complement = "full",
        train_other: Literal["none", "norms", "all"] = "none",
        previous: list[str] | None = None,
        lr_scale: Annotated[float, Bounds("> 0")] = 1.0,
        forward: Literal["auto", "merged", "factored"] = "auto",
        parametrization: Parametrization = "delta",
        fused: Literal["parts", "whole"] = "parts",
        ranks: Literal["uniform", "adaptive"] = "uniform",
        rank_bounds: tuple[float, float] = (0.0, 1.0),
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.delta_config = DeltaConfig(unfreeze_rank_ratio, complement, forward, parametrization, fused)
        if ranks == "adaptive":
            layer_ratios([1.0], unfreeze_rank_ratio, rank_bounds)  # refuses bounds that cannot be kept
        elif rank_bounds != (0.0, 1.0):
            raise ConfigError(
                "rank_bounds holds for adaptive ranks only",
                where="model.init_args.rank_bounds",
                remedy="set ranks to adaptive, or leave it out",
            )
        self.previous_tasks = PreviousTasks.of(previous or [])
        if parametrization == "usv" and previous:
            raise ConfigError(
                "previous does not go with the published form", where="model.init_args.previous", remedy="use delta"
            )
        self.targets = targets
        self.train_other = train_other
        self.ranks = ranks
        self.rank_bounds = rank_bounds
        self.layer_ratios: list[float] | None = None
        self.lr_scale = lr_scale
        self.decomposed = 0
        self.mismatch_warnings: list[str] = []
        self._targets: list[WeightMatrix] = []

    # ---- what trains -------------------------------------------------------------------------------------------------

    def choose_trainable(self, model: PreTrainedModel) -> None:
        """Freeze everything and put a change under each target."""
        self.previous_tasks.check(model)
        if not next(model.parameters()).is_meta:
            self.mismatch_warnings = self.previous_tasks.mismatch_warnings(model)
        model.requires_grad_(False)
        groups = {matrix.group for matrix in weight_matrices(model)}
        default = [group for group in ("attention", "mlp", "experts") if group in groups]
        wanted = (default or ALL_LINEAR) if self.targets is None else self.targets  # all-linear says what there is
        self._targets = resolve_targets(model, wanted)
        inject_deltas(model, self._targets, self._delta_config(), self._ratios(model), self.previous_tasks.rank)
        names = {matrix.full_name for matrix in self._targets}
        norms = _norms(model)
        for name, parameter in model.named_parameters():
            is_other = merged_name(name) not in (None, *names)
            if is_other and (self.train_other == "all" or (self.train_other == "norms" and name in norms)):
                parameter.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"with unfreeze_rank_ratio {self.delta_config.ratio} nothing at all would train",
                where=RATIO_OPTION,
                remedy="raise it, or set train_other",
            )

    def _delta_config(self) -> DeltaConfig:
        """Return what the changes look like, with what is known of the data and the trainer by now."""
        batching = getattr(self._data(), "batching", None)
        # Full sharding gathers what a change is made of in the precision that is computed in.
        trainer = trainer_of(self)
        is_gathered = trainer is not None and isinstance(trainer.strategy, MeshStrategy)
        is_rounded = is_gathered and self.trainer.precision == "bf16-mixed"
        return replace(self.delta_config, row_tokens=batching.max_tokens if batching else None, is_rounded=is_rounded)

    def _ratios(self, model: PreTrainedModel) -> Callable[[WeightMatrix], float] | None:
        """Return what gives the ratio of each weight; None where all have the same."""
        if self.ranks == "uniform":
            return None
        assert self.layer_ratios is not None, "they are found before anything is made trainable"
        names = {block: name for name, block in model.named_modules()}
        layers = [f"{names[block]}." for block in decoder_blocks(model)]
        found = dict(zip(layers, self.layer_ratios, strict=True))

        def ratio(matrix: WeightMatrix) -> float:
            return next(
                (own for layer, own in found.items() if matrix.full_name.startswith(layer)), self.delta_config.ratio
            )

        return ratio

    def configure_model(self) -> None:
        """Read the weights, and find out along which directions each may learn: a checkpoint knows it already."""
        if self.model is not None:
            return
        self._remember()
        super().configure_model()
        if self.run.resume_from is not None:
            return
        with_bases = [
            site for site in self.parametrized_weights() if any(piece.basis_names for _, _, piece, _ in site.pieces())
        ]
        with DecompositionProgress(speaks=self.trainer.is_global_zero) as progress:
            cache = BasesCache(default_cache_dir())
            device = self.trainer.strategy.root_device
            self.decomposed = compute_bases(with_bases, cache, self.previous_tasks, progress.done, device)

    def build_empty(self) -> None:
        """Build the model with the ranks of the checkpoint that is to fill it."""
        self._remember()
        super().build_empty()

    def _remember(self) -> None:
        if self.run.resume_from is None:
            return
        state = read_state(self.run.resume_from)
        self.layer_ratios = state.get(LAYER_RATIOS)
        if state.get(PREVIOUS, self.previous_tasks.fingerprint) != self.previous_tasks.fingerprint:
            raise ConfigError(
                "the checkpoint protects what other files hold, or none",
                where="model.init_args.previous",
                remedy="name those that the run began with, or start a new run",
            )

    def load_weights(self, attention: str) -> PreTrainedModel:
        """Read the weights, and find the ratio of each layer where ranks are adaptive."""
        model = super().load_weights(attention)
        if self.ranks == "adaptive" and self.layer_ratios is None:
            plan = getattr(self._data(), "plan", None)
            if plan is None:
                raise ConfigError("adaptive ranks need data", where="model.init_args.ranks", remedy="use ChatData")
            alike = similarities(model, plan.step(0, 0).rows)
            self.layer_ratios = layer_ratios(alike, self.delta_config.ratio, self.rank_bounds)
        return model

    def build_on_meta(self, capabilities: ModelCapabilities | None) -> PreTrainedModel:
        """Build the model without weights, with the ratios that rank 0 has found."""
        if self.ranks == "adaptive":
            self.layer_ratios = Ranks().run_on_rank_zero(lambda: self.layer_ratios)
        return super().build_on_meta(capabilities)

    def parametrized_weights(self) -> Iterator[ParametrizedWeight]:
        """Yield the weights that have a change."""
        assert self.model is not None, "configure_model has run"
        return parametrized_weights(self.model, self._targets)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the changes a learning rate of their own."""
        changes = {id(parameter) for site in self.parametrized_weights() for parameter in site.change.trained()}
        return [
            {**group, "params": params, "lr": self.learning_rate * scale}
            for group in super().parameter_groups()
            for scale, params in (
                (self.lr_scale, [one for one in group["params"] if id(one) in changes]),
                (1.0, [one for one in group["params"] if id(one) not in changes]),
            )
            if params
        ]

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has, without bases and changes."""
        assert self.model is not None, "configure_model has run"
        own = (parameter for name, parameter in self.model.named_parameters() if merged_name(name) is not None)
        return sum(parameter.numel() for parameter in own)

    def summary_lines(self) -> list[str]:
        """Return what trains, by shape, and what no target names."""
        lines = [f"osft   {line}" for line in lines_by_shape(self.parametrized_weights())]
        if self.layer_ratios is not None:
            lines.append(f"osft   ratio of each layer: {' '.join(f'{ratio:.3f}' for ratio in self.layer_ratios)}")
        named = {matrix.full_name for matrix in self._targets}
        changed = {site.matrix.full_name for site in self.parametrized_weights()}
        assert self.model is not None, "configure_model has run"
        others = [
            matrix for matrix in weight_matrices(self.model) if merged_name(matrix.full_name) not in (None, *named)
        ]
        how = "also train" if self.train_other == "all" else "stay as they are"
        lines += [f"osft   no rank is left for {name}: it stays" for name in sorted(named - changed)]
        lines += [f"osft   {how}: {describe_matrices(others)}"] * bool(others)
        return lines + [f"osft   {line}" for line in self.mismatch_warnings]

    def generate(self, *args: Any, **kwargs: Any) -> list[str]:
        """Answer prompts with weights that are built once, not for every token."""
        with cached_weights(list(self.parametrized_weights())):
            return super().generate(*args, **kwargs)

    # ---- the published form is projected around each step ------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Project the gradients, before they are clipped."""
        for site in self.parametrized_weights():
            site.change.project_gradients()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and project what has moved."""
        super().optimizer_step(*args, **kwargs)
        for site in self.parametrized_weights():
            site.change.project()

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the ranks of the layers: they cannot be told from the options alone."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[PREVIOUS] = self.previous_tasks.fingerprint
        if self.layer_ratios is not None:
            checkpoint[LAYER_RATIOS] = self.layer_ratios

    def export_state(self) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Return the model and its weights with their changes, under the names that they had before."""
        assert self.model is not None, "configure_model has run"
        state = full_state_dict(self.model)
        return self.model, merged_state(self.parametrized_weights(), state) if state else {}  # rank 0 has gathered

    def export(self, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the weights with their changes, and the exact changes beside them; say how large these are."""
        assert self.model is not None, "configure_model has run"
        state = full_state_dict(self.model)
        if state:
            self._write(target, tokenizer, state, merged_state(self.parametrized_weights(), state))
            print(f"osft   {describe_sizes(merge_delta(self.parametrized_weights(), state))}", flush=True)
            halves = {site.original.dtype for site in self.parametrized_weights()} - {torch.float32, torch.float64}
            for dtype in halves:
                print(f"osft   {self._leaking(state, dtype).describe()}", flush=True)

    def export_merged(self, target: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None) -> str:
        """Write a plain model in a dtype (that of the base on disk if None); return what rounding did to the change."""
        assert self.model is not None, "configure_model has run"
        wanted = dtype or self.pretrained.stored_dtype
        state = full_state_dict(self.model)
        self._write(target, tokenizer, state, merged_state(self.parametrized_weights(), state, wanted))
        return f"merge  {self._leaking(state, wanted).describe()}"

    def _leaking(self, state: dict[str, Tensor], dtype: torch.dtype) -> LeakageReport:
        """Return what becomes of the changes in weights of a dtype."""
        leaking = LeakageReport(dtype)
        for one in merge_delta(self.parametrized_weights(), state):
            leaking.count(one)
        return leaking

    def _write(
        self, target: Path, tokenizer: PreTrainedTokenizerBase, state: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> None:
        assert self.model is not None, "configure_model has run"
        settings = {"unfreeze_rank_ratio": self.delta_config.ratio, **asdict(self.delta_config)}

        def changes(folder: Path) -> None:
            write_changes(folder / DELTA_FILE, merge_delta(self.parametrized_weights(), state), settings)

        write_export(target, self.model, weights, tokenizer, changes)


def _norms(model: PreTrainedModel) -> set[str]:
    """Return the names of what normalisation layers hold: by their class, as GPT-2 calls its own ``ln_1``."""
    layers = [(path, layer) for path, layer in model.named_modules() if "norm" in type(layer).__name__.lower()]
    return {f"{path}.{name}" for path, layer in layers for name, _ in layer.named_parameters(recurse=False)}
