"""What a person is told of the changes of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lightning_hub.methods.osft.inject import ParametrizedWeight
from lightning_hub.methods.osft.weight_delta import FusedDelta, SingleDelta


def lines_by_shape(sites: Iterable[ParametrizedWeight]) -> list[str]:
    """Return a line for each shape of weights: how many there are, how many of their directions train, and how.

    A last one tells what is held beside the parameters, which no strategy cuts.
    """
    found: dict[tuple[int, ...], list[tuple[ParametrizedWeight, SingleDelta]]] = {}
    kept: list[int] = []
    for site in sites:
        for _, _, piece, part in site.pieces():
            found.setdefault(tuple(part.shape), []).append((site, piece))
            if piece.kept is not None:
                kept.append(piece.kept.nbytes)
    lines = [_told(shape, same) for shape, same in found.items()]
    return lines + [f"bases of {len(kept)} weights are whole on every rank: {sum(kept) / 1e6:.1f} MB"] * bool(kept)


def _told(shape: tuple[int, ...], same: Sequence[tuple[ParametrizedWeight, SingleDelta]]) -> str:
    ranks = sorted({piece.rank for _, piece in same})
    some = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    size = same[0][1].rank + same[0][1].protected
    ways = Counter(site.change.forward_as for site, _ in same)
    parts = "parts of weights" if any(isinstance(site.change, FusedDelta) for site, _ in same) else "weights"
    how = ", ".join(ways) if len(ways) == 1 else ", ".join(f"{count} {way}" for way, count in ways.items())
    return f"{len(same)} {parts} of {' x '.join(map(str, shape))}: {some} of {size} directions train ({how})"
