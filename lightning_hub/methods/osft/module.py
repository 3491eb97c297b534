"""OSFT: the module that trains changes in the unprotected subspace of each weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_hub.errors import ConfigError
from lightning_hub.methods.osft.bases import BasesCache, fill_bases
from lightning_hub.methods.osft.delta import Complement, Delta
from lightning_hub.methods.osft.surgery import Site, add_changes, merged_name, sites
from lightning_hub.methods.sft import SFT
from lightning_hub.methods.targets import Matrix, matrices, resolve
from lightning_hub.parallel.gathering import full_state
from lightning_hub.runs.folder import default_cache_dir


class OSFT(SFT):
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
        lr_scale: Factor of the learning rate for the changes. They move a weight about ten times as far a step as
            the published factor form does at the same learning rate.
        **options: SFT's.
    """

    def __init__(
        self,
        model: str,
        unfreeze_rank_ratio: float = 0.25,
        targets: str | list[str] | None = None,
        complement: Complement = "full",
        train_other: Literal["none", "norms", "all"] = "none",
        lr_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if not 0.0 <= unfreeze_rank_ratio <= 1.0:
            raise ConfigError(
                f"unfreeze_rank_ratio is {unfreeze_rank_ratio}",
                where="model.init_args.unfreeze_rank_ratio",
                remedy="use 0 to 1",
            )
        self.unfreeze_rank_ratio = unfreeze_rank_ratio
        self.targets = targets
        self.complement: Complement = complement
        self.train_other = train_other
        self.lr_scale = lr_scale
        self.decomposed = 0
        self._chosen: list[Matrix] = []

    # ---- what trains -------------------------------------------------------------------------------------------------

    def choose_trainable(self, model: PreTrainedModel) -> None:
        """Freeze everything and put a change under each target."""
        model.requires_grad_(False)
        groups = {matrix.group for matrix in matrices(model)}
        default = [group for group in ("attention", "mlp", "experts") if group in groups]
        self._chosen = resolve(model, self.targets or default)
        add_changes(model, self._chosen, self.unfreeze_rank_ratio, self.complement)
        names = {matrix.full_name for matrix in self._chosen}
        for name, parameter in model.named_parameters():
            is_other = merged_name(name) not in (None, *names)
            if is_other and (self.train_other == "all" or (self.train_other == "norms" and "norm" in name)):
                parameter.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"with unfreeze_rank_ratio {self.unfreeze_rank_ratio} nothing at all would train",
                where="model.init_args.unfreeze_rank_ratio",
                remedy="raise it, or set train_other",
            )

    def configure_model(self) -> None:
        """Read the weights, and find out along which directions each may learn."""
        if self.model is not None:
            return
        super().configure_model()
        with_bases = [site for site in self.sites() if site.delta.side != "all"]
        self.decomposed = fill_bases(with_bases, BasesCache(default_cache_dir()))

    def sites(self) -> Iterator[Site]:
        """Yield the weights that have a change."""
        assert self.model is not None, "configure_model has run"
        return sites(self.model, self._chosen)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the changes a learning rate of their own."""
        changes = {id(site.delta.delta) for site in self.sites()}
        return [
            {**group, "params": params, "lr": self.learning_rate * scale}
            for group in super().parameter_groups()
            for scale, params in (
                (self.lr_scale, [one for one in group["params"] if id(one) in changes]),
                (1.0, [one for one in group["params"] if id(one) not in changes]),
            )
            if params
        ]

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def export_state(self) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Return the model and its weights with their changes, under the names that they had before."""
        assert self.model is not None, "configure_model has run"
        state = full_state(self.model)
        if not state:  # rank 0 has gathered
            return self.model, {}
        for site in self.sites():
            _merge(site, state)
        return self.model, {name: state[key] for key in state if (name := merged_name(key)) is not None}


@torch.no_grad()
def _merge(site: Site, state: dict[str, Tensor]) -> None:
    """Put the weight with its change in the place of the weight; entries that do not change keep their bits."""
    prefix = f"{site.matrix.module}.parametrizations.{site.matrix.parameter}"
    names = [name for name, _ in site.delta.named_parameters()]
    parts = {name: state[f"{prefix}.0.{name}"] for name in names}
    kept = {} if site.delta.kept is None else {"kept": site.delta.kept.cpu()}
    weight = state[f"{prefix}.original"]
    change = _call(site.delta, {**parts, **kept}, weight)
    state[f"{prefix}.original"] = torch.where(change == 0, weight, (weight + change).to(weight.dtype))


def _call(delta: Delta, tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Compute a change from whole tensors, whatever its module holds."""

    class Change(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = delta

        def forward(self, weight: Tensor) -> Tensor:
            return delta.change(weight)

    named = {f"inner.{name}": tensor for name, tensor in tensors.items()}
    result: Tensor = torch.func.functional_call(Change(), named, (weight,))
    return result
