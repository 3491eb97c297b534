"""OSFT: the module that trains changes in the unprotected subspace of each weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_hub.checkpoints.export import write_export
from lightning_hub.errors import ConfigError
from lightning_hub.methods.osft.bases import BasesCache, fill_bases
from lightning_hub.methods.osft.chain import Earlier
from lightning_hub.methods.osft.delta import Complement
from lightning_hub.methods.osft.product import DELTA_FILE, Rounding, merged, merged_state, write_changes
from lightning_hub.methods.osft.surgery import Site, add_changes, merged_name, sites
from lightning_hub.methods.sft import SFT
from lightning_hub.methods.targets import Matrix, describe, matrices, resolve
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
        previous: Exports of earlier OSFT runs, oldest first, whose changes are protected as well: what they have learnt
            is left alone. Their directions count in unfreeze_rank_ratio.
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
        previous: list[str] | None = None,
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
        self.earlier = Earlier.of(previous or [])
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
        add_changes(model, self._chosen, self.unfreeze_rank_ratio, self.complement, self.earlier.rank)
        names = {matrix.full_name for matrix in self._chosen}
        norms = _norms(model)
        for name, parameter in model.named_parameters():
            is_other = merged_name(name) not in (None, *names)
            if is_other and (self.train_other == "all" or (self.train_other == "norms" and name in norms)):
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
        self.decomposed = fill_bases(with_bases, BasesCache(default_cache_dir()), self.earlier)

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

    def describe(self) -> list[str]:
        """Return what trains, by shape, and what no target names."""
        found: dict[tuple[int, ...], list[Site]] = {}
        for site in self.sites():
            found.setdefault(site.matrix.shape, []).append(site)
        lines = [
            f"osft   {len(same)} weights of {' x '.join(map(str, shape))}: {same[0].delta.rank} of "
            f"{same[0].delta.rank + same[0].delta.protected} directions train"
            for shape, same in found.items()
        ]
        named = {matrix.full_name for matrix in self._chosen}
        changed = {site.matrix.full_name for site in self.sites()}
        assert self.model is not None, "configure_model has run"
        left = [matrix for matrix in matrices(self.model) if self._name_before(matrix) not in named]
        others = [matrix for matrix in left if ".parametrizations." not in matrix.full_name]
        how = "also train" if self.train_other == "all" else "stay as they are"
        lines += [f"osft   no rank is left for {name}: it stays" for name in sorted(named - changed)]
        return lines + [f"osft   {how}: {describe(others)}"] * bool(others)

    @staticmethod
    def _name_before(matrix: Matrix) -> str | None:
        return merged_name(matrix.full_name)

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def export_state(self) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Return the model and its weights with their changes, under the names that they had before."""
        assert self.model is not None, "configure_model has run"
        state = full_state(self.model)
        return self.model, merged_state(self.sites(), state) if state else {}  # rank 0 has gathered

    def export(self, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the weights with their changes, and the exact changes beside them."""
        assert self.model is not None, "configure_model has run"
        state = full_state(self.model)
        if state:
            self._write(target, tokenizer, state, merged_state(self.sites(), state))

    def export_merged(self, target: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None) -> str:
        """Write a plain model in a dtype (that of the base on disk if None); return what rounding did to the change."""
        assert self.model is not None, "configure_model has run"
        on_disk = self.pretrained.config.dtype
        wanted = dtype or (on_disk if isinstance(on_disk, torch.dtype) else torch.float32)
        state = full_state(self.model)
        rounding = Rounding()
        for site, one in zip(self.sites(), merged(self.sites(), state), strict=True):
            rounding.add(one, site.delta, wanted)
        weights = {name: tensor.to(wanted) for name, tensor in merged_state(self.sites(), state).items()}
        self._write(target, tokenizer, state, weights)
        return rounding.describe(wanted)

    def _write(
        self, target: Path, tokenizer: PreTrainedTokenizerBase, state: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> None:
        assert self.model is not None, "configure_model has run"
        settings = {"unfreeze_rank_ratio": self.unfreeze_rank_ratio, "complement": self.complement}

        def changes(folder: Path) -> None:
            write_changes(folder / DELTA_FILE, merged(self.sites(), state), settings)

        write_export(target, self.model, weights, tokenizer, changes)


def _norms(model: PreTrainedModel) -> set[str]:
    """Return the names of what normalisation layers hold: by their class, as GPT-2 calls its own ``ln_1``."""
    layers = [(path, layer) for path, layer in model.named_modules() if "norm" in type(layer).__name__.lower()]
    return {f"{path}.{name}" for path, layer in layers for name, _ in layer.named_parameters(recurse=False)}
