"""Lines about the deltas of a model, for the summary at the start of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lightning_hub.methods.osft.inject import ParametrizedWeight
from lightning_hub.methods.osft.weight_delta import FusedDelta, SingleDelta


def lines_by_shape(weights: Iterable[ParametrizedWeight]) -> list[str]:
    """Return a line for each shape of weights: their number, their trained directions, and the forward of the deltas.

    A last line gives the size of the bases that are buffers, which no strategy shards.
    """
    found: dict[tuple[int, ...], list[tuple[ParametrizedWeight, SingleDelta]]] = {}
    stored: list[int] = []  # bytes
    for parametrized in weights:
        for _, _, piece, part in parametrized.pieces():
            found.setdefault(tuple(part.shape), []).append((parametrized, piece))
            if piece.kept is not None:
                stored.append(piece.kept.nbytes)
    lines = [_line(shape, same) for shape, same in found.items()]
    if stored:
        lines.append(f"bases of {len(stored)} weights are not sharded: {sum(stored) / 1e6:.1f} MB on every rank")
    return lines


def _line(shape: tuple[int, ...], same: Sequence[tuple[ParametrizedWeight, SingleDelta]]) -> str:
    ranks = sorted({piece.rank for _, piece in same})
    trained = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    size = same[0][1].rank + same[0][1].protected
    forwards = Counter(parametrized.delta.forward_as for parametrized, _ in same)
    parts = (
        "parts of weights" if any(isinstance(parametrized.delta, FusedDelta) for parametrized, _ in same) else "weights"
    )
    how = (
        ", ".join(forwards) if len(forwards) == 1 else ", ".join(f"{count} {name}" for name, count in forwards.items())
    )
    return f"{len(same)} {parts} of {' x '.join(map(str, shape))}: {trained} of {size} directions train ({how})"
