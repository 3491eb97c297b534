"""The bases of all changes of a model: computed once for a weight, shared out over the ranks, kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_hub.methods.osft.inject import ParametrizedWeight
from lightning_hub.methods.osft.previous_tasks import PreviousTasks, Spans, protect
from lightning_hub.methods.osft.subspace import split_subspace
from lightning_hub.methods.osft.weight_delta import SingleDelta, WeightDelta
from lightning_hub.parallel.collectives import Ranks, is_distributed
from lightning_hub.parallel.dtensor import local_shard_of, local_tensor

VERSION = 3
"""Of the algorithm: a change of what it computes raises it, and old entries are left alone."""

STORED_BASIS = "kept"


class BasesCache:
    """Bases on disk, named by everything that shaped them.

    Args:
        root: Where they lie; made if absent.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "bases"

    def path(self, weight: Tensor, change: WeightDelta, previous_tasks: str = "") -> Path:
        """Return where the bases of a weight lie: a hash of its bytes and of how it is split.

        Args:
            weight: The weight.
            change: Its change.
            previous_tasks: A fingerprint of what earlier tasks have learned in it: equal weights can differ in that.
        """
        bits = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest = hashlib.sha256(bits.data)
        digest.update(f"{VERSION} {tuple(weight.shape)} {weight.dtype} {change.plan()} {previous_tasks}".encode())
        return self.root / f"{digest.hexdigest()[:40]}.safetensors"

    def load(self, path: Path) -> dict[str, Tensor] | None:
        """Return bases, or None where there are none that can be read."""
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            return None

    def save(self, path: Path, bases: dict[str, Tensor]) -> None:
        """Write bases, if they can be written; a reader sees all of them or none."""
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            save_file({name: basis.contiguous() for name, basis in bases.items()}, temporary)
            temporary.replace(path)
        except (OSError, SafetensorError):  # a full or foreign disk: the next start computes them again
            return


def decompose(weight: Tensor, piece: SingleDelta, name: str, previous_tasks: Spans | None = None) -> dict[str, Tensor]:
    """Return the bases of a weight, or of each expert's, as its change keeps them.

    Args:
        weight: The weight, or one for each expert.
        piece: Its change.
        name: For errors.
        previous_tasks: What the columns and rows of earlier changes span, which is protected as well.

    Raises:
        DecompositionError: The weight holds what is no number.
    """
    slices = weight if weight.ndim == 3 else weight[None]
    splits = [split_subspace(one, piece.rank + piece.taken, name) for one in slices]
    if previous_tasks is not None:
        spans = [(part if weight.ndim == 3 else part[None]) for part in previous_tasks]
        splits = [protect(one, *span) for one, *span in zip(splits, *spans, strict=True)]
    found = [piece.bases_of(one) for one in splits]
    made = {key: torch.stack([one[key] for one in found]).to(getattr(piece, key).dtype) for key in piece.basis_names}
    if any(piece.needs_kept(one) for one in splits):
        made[STORED_BASIS] = torch.stack([one.long_side for one in splits]).float()
    return {key: basis if weight.ndim == 3 else basis[0] for key, basis in made.items()}


@torch.no_grad()
def compute_bases(
    found: Sequence[ParametrizedWeight],
    cache: BasesCache,
    previous_tasks: PreviousTasks | None = None,
    done: Callable[[float], None] = lambda share: None,
    device: torch.device | None = None,
) -> int:
    """Give every change its bases, and return how many weights had to be decomposed on this rank.

    Each rank decomposes its share while the others do theirs; then the bases go round. Every rank must call this.

    Args:
        found: The changes, the same on every rank.
        cache: Where bases are looked for and kept.
        previous_tasks: What earlier tasks have learnt, which is protected as well.
        done: Called after each weight that this rank has decomposed, with the share of its work that is behind it.
        device: Where decompositions are computed; where the weights are if None.

    Raises:
        DecompositionError: A weight cannot be decomposed; on every rank.
    """
    ranks = Ranks()
    costs = [decomposition_cost(site) for site in found]
    owners = assign_owners(costs, ranks.size)
    mine: dict[int, Tensor] = {}
    for place, site in enumerate(found):
        whole = site.original.full_tensor() if isinstance(site.original, DTensor) else site.original
        if owners[place] == ranks.rank:
            mine[place] = whole.detach()
    made: dict[int, dict[str, Tensor]] = {}
    previous_tasks = previous_tasks or PreviousTasks()

    def work() -> int:
        decomposed, behind, total = 0, 0.0, sum(costs[place] for place in mine)
        for place, weight in mine.items():
            made[place], is_new = _bases(
                found[place], weight if device is None else weight.to(device), cache, previous_tasks
            )
            decomposed += is_new
            behind += costs[place]
            if is_new:
                done(behind / total)
        return decomposed

    decomposed = ranks.run_on_all(work)[ranks.rank]
    for place, site in enumerate(found):
        _broadcast_bases(site.change, made.pop(place, None), owners[place])
        site.change.begin()
    return decomposed


def _bases(
    site: ParametrizedWeight, weight: Tensor, cache: BasesCache, previous_tasks: PreviousTasks
) -> tuple[dict[str, Tensor], bool]:
    """Return the bases of one change by their names in it, and whether they had to be computed."""
    learnt = (
        f"{previous_tasks.fingerprint} {site.matrix.full_name}" if previous_tasks.paths else ""
    )  # equal weights may differ in it
    path = cache.path(weight, site.change, learnt)
    bases = cache.load(path)
    if bases is not None:
        return bases, False
    bases = {}
    for name, place, piece, part in site.pieces(weight):
        if not piece.basis_names:
            continue
        found = decompose(part, piece, name, previous_tasks.spans(name))
        bases |= {f"{place}{key}": basis for key, basis in found.items()}
    cache.save(path, {name: basis.cpu() for name, basis in bases.items()})
    return bases, True


def decomposition_cost(site: ParametrizedWeight) -> float:
    """Return what a decomposition takes, relative to others: the shorter side squared times the longer one."""
    *experts, out, into = site.matrix.shape
    return (experts[0] if experts else 1) * min(out, into) ** 2 * max(out, into)


def assign_owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Return the rank of each piece of work: the dearest first, each to the rank that has least to do."""
    loads = [0.0] * num_ranks
    owners = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += costs[place]
    return owners


def _broadcast_bases(change: WeightDelta, bases: dict[str, Tensor] | None, owner: int) -> None:
    """Send the bases of one change from the rank that has them, and keep this rank's part."""
    device = local_tensor(change.trained()[0]).device
    shapes = [{name: basis.shape for name, basis in (bases or {}).items()}]
    if is_distributed():
        torch.distributed.broadcast_object_list(shapes, src=owner)
    targets = dict(change.named_parameters())
    for name, shape in shapes[0].items():
        target = targets.get(name)
        dtype = torch.float32 if target is None else target.dtype
        whole = torch.empty(shape, dtype=dtype) if bases is None else bases[name]
        whole = whole.to(device=device, dtype=dtype).contiguous()
        if is_distributed():
            torch.distributed.broadcast(whole, src=owner)
        if target is None:
            change.get_submodule(name.rpartition(".")[0]).kept = whole
        else:
            local_tensor(target.detach()).copy_(local_shard_of(whole, target))
