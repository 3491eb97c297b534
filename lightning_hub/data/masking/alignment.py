"""Compares a generation prompt with the text that the full rendering has at the same position."""

from __future__ import annotations


def align_ignoring_whitespace(tail: str, gap: str) -> tuple[int, list[int]]:
    """Follow two texts side by side while they are equal except for the amount of white space.

    Returns:
        How far ``tail`` was followed, and for each of its characters (and its end) the position in ``gap``.
    """
    matched = [0]
    i = j = 0
    while i < len(tail):
        if j < len(gap) and tail[i] == gap[j]:
            i, j = i + 1, j + 1
        else:
            next_i, next_j = _skip_space(tail, i), _skip_space(gap, j)
            if next_i < len(tail) and (next_j >= len(gap) or tail[next_i] != gap[next_j] or (next_i, next_j) == (i, j)):
                break
            if next_i == len(tail):
                next_j = j
            i, j = next_i, next_j
        matched.extend([j] * (i + 1 - len(matched)))
    return i, matched


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
