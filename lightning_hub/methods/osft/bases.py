"""Computes the bases of all deltas of a model: the work is split over the ranks, and the results are cached on disk."""

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
"""Version of the algorithm, part of the cache key: raise it when the computed bases change."""

STORED_BASIS = "kept"
"""Name of the buffer of a delta for a basis that the weight cannot give accurately; part of checkpoints."""


class BasesCache:
    """A folder of bases; the name of a file is a hash of everything that its bases depend on.

    Args:
        root: The cache folder; it is created if it does not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "bases"

    def path(self, weight: Tensor, delta: WeightDelta, previous_tasks: str = "") -> Path:
        """Return the file for the bases of a weight: its name is a hash of the bytes of the weight and of the split.

        Args:
            weight: The full weight.
            delta: Its delta.
            previous_tasks: A fingerprint of the deltas of previous tasks: equal weights can differ in these.
        """
        bits = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest = hashlib.sha256(bits.data)
        digest.update(f"{VERSION} {tuple(weight.shape)} {weight.dtype} {delta.plan()} {previous_tasks}".encode())
        return self.root / f"{digest.hexdigest()[:40]}.safetensors"

    def load(self, path: Path) -> dict[str, Tensor] | None:
        """Return the bases by name, or None if the file does not exist or is damaged."""
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            return None

    def save(self, path: Path, bases: dict[str, Tensor]) -> None:
        """Write bases in one rename, so that a reader sees a complete file; errors of the disk are ignored."""
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            save_file({name: basis.contiguous() for name, basis in bases.items()}, temporary)
            temporary.replace(path)
        except (OSError, SafetensorError):  # a full or read-only disk: the next start computes them again
            return


def decompose(weight: Tensor, piece: SingleDelta, name: str, previous_tasks: Spans | None = None) -> dict[str, Tensor]:
    """Return the bases of a weight, or of the weight of each expert, as its delta stores them.

    Args:
        weight: Shape ``(out, in)``, or ``(experts, out, in)``, any dtype.
        piece: The delta of the weight.
        name: Name of the weight, for errors.
        previous_tasks: Spans of the deltas of previous tasks, which are protected as well: of their columns,
            ``([experts,] out, t)``, and of their rows, ``([experts,] t, in)``.

    Returns:
        The bases by the names of the parameters of ``piece``, in their shapes and dtypes, on the device of the weight.
        If the weight cannot give the protected directions of its longer side accurately, also ``kept``: float32,
        ``(out, k)`` for a tall weight or ``(k, in)`` for a wide one, with ``k`` protected directions.

    Raises:
        DecompositionError: The weight has NaN or infinite numbers.
    """
    slices = weight if weight.ndim == 3 else weight[None]
    splits = [split_subspace(one, piece.rank + piece.num_reserved, name) for one in slices]
    if previous_tasks is not None:
        spans = [(part if weight.ndim == 3 else part[None]) for part in previous_tasks]
        splits = [protect(one, *span) for one, *span in zip(splits, *spans, strict=True)]
    split_bases = [piece.bases_of(one) for one in splits]
    bases = {
        key: torch.stack([one[key] for one in split_bases]).to(getattr(piece, key).dtype) for key in piece.basis_names
    }
    if any(piece.needs_stored_basis(one) for one in splits):
        bases[STORED_BASIS] = torch.stack([one.long_side for one in splits]).float()
    return {key: basis if weight.ndim == 3 else basis[0] for key, basis in bases.items()}


@torch.no_grad()
def compute_bases(
    found: Sequence[ParametrizedWeight],
    cache: BasesCache,
    previous_tasks: PreviousTasks | None = None,
    done: Callable[[float], None] = lambda share: None,
    device: torch.device | None = None,
) -> int:
    """Set the bases of every delta, and return the number of weights that this rank had to decompose.

    Each rank decomposes some of the weights; then the bases are broadcast. Every rank must call this.

    Args:
        found: The parametrized weights, the same on every rank.
        cache: The bases on disk.
        previous_tasks: The deltas of previous tasks, whose spans are protected as well.
        done: Called after each weight that this rank has decomposed, with the finished share of its work, 0 to 1.
        device: The device of the decompositions; that of the weights if None.

    Raises:
        DecompositionError: A weight cannot be decomposed; on every rank.
    """
    ranks = Ranks()
    costs = [decomposition_cost(parametrized) for parametrized in found]
    owners = assign_owners(costs, ranks.size)
    owned: dict[int, Tensor] = {}
    for index, parametrized in enumerate(found):
        original = parametrized.original
        full = original.full_tensor() if isinstance(original, DTensor) else original  # a collective: on every rank
        if owners[index] == ranks.rank:
            owned[index] = full.detach()
    bases: dict[int, dict[str, Tensor]] = {}
    previous_tasks = previous_tasks or PreviousTasks()

    def work() -> int:
        decomposed, finished, total = 0, 0.0, sum(costs[index] for index in owned)
        for index, weight in owned.items():
            bases[index], is_new = _bases(
                found[index], weight if device is None else weight.to(device), cache, previous_tasks
            )
            decomposed += is_new
            finished += costs[index]
            if is_new:
                done(finished / total)
        return decomposed

    decomposed = ranks.run_on_all(work)[ranks.rank]
    for index, parametrized in enumerate(found):
        _broadcast_bases(parametrized.delta, bases.pop(index, None), owners[index])
        parametrized.delta.begin()
    return decomposed


def _bases(
    parametrized: ParametrizedWeight, weight: Tensor, cache: BasesCache, previous_tasks: PreviousTasks
) -> tuple[dict[str, Tensor], bool]:
    """Return the bases of one delta by the names of its parameters, and whether they had to be computed."""
    # Equal weights can have different deltas of previous tasks, so these are part of the key.
    protected = f"{previous_tasks.fingerprint} {parametrized.matrix.full_name}" if previous_tasks.paths else ""
    path = cache.path(weight, parametrized.delta, protected)
    bases = cache.load(path)
    if bases is not None:
        return bases, False
    bases = {}
    for name, prefix, piece, part in parametrized.pieces(weight):
        if not piece.basis_names:
            continue
        found = decompose(part, piece, name, previous_tasks.spans(name))
        bases |= {f"{prefix}{key}": basis for key, basis in found.items()}
    cache.save(path, {name: basis.cpu() for name, basis in bases.items()})
    return bases, True


def decomposition_cost(parametrized: ParametrizedWeight) -> float:
    """Return the relative cost of a decomposition: experts times shorter side squared times longer side."""
    *experts, out, into = parametrized.matrix.shape
    return (experts[0] if experts else 1) * min(out, into) ** 2 * max(out, into)


def assign_owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Return the rank that does each piece of work: most expensive first, each to the rank with the least work."""
    loads = [0.0] * num_ranks
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def _broadcast_bases(delta: WeightDelta, bases: dict[str, Tensor] | None, owner: int) -> None:
    """Broadcast the bases of one delta from the rank that has them, and copy this rank's shard into the delta."""
    device = local_tensor(delta.trained()[0]).device
    shapes = [{name: basis.shape for name, basis in (bases or {}).items()}]
    if is_distributed():
        torch.distributed.broadcast_object_list(shapes, src=owner)
    targets = dict(delta.named_parameters())
    for name, shape in shapes[0].items():
        target = targets.get(name)
        dtype = torch.float32 if target is None else target.dtype
        full = torch.empty(shape, dtype=dtype) if bases is None else bases[name]
        full = full.to(device=device, dtype=dtype).contiguous()
        if is_distributed():
            torch.distributed.broadcast(full, src=owner)
        if target is None:
            delta.get_submodule(name.rpartition(".")[0]).kept = full
        else:
            local_tensor(target.detach()).copy_(local_shard_of(full, target))
