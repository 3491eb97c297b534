"""Finds the end of the generation prompt in a full rendering."""

from __future__ import annotations

from lightning_hub.data.masking.template_profile import TemplateProfile


def find_prompt(profile: TemplateProfile, gap: str) -> int | None:
    """Look for the longest beginning of the generation prompt that ends between two of its tokens.

    Args:
        profile: Has the prompt.
        gap: The rendering between the text before a turn and the turn's own text.

    Returns:
        The end of the prompt in ``gap``, or None.
    """
    if not profile.prompt:
        return len(gap)
    for cut in reversed(profile.prompt_cuts):
        found = gap.rfind(profile.prompt[:cut])
        if found >= 0:
            return found + cut
    return None


def match_prompt(profile: TemplateProfile, tail: str, gap: str) -> int | None:
    """Compare what a template writes before a generation with the text that the full rendering has there.

    Args:
        profile: Has the prompt.
        tail: What the template writes between the last text before a turn and the first generated token.
        gap: The rendering between the same text and the turn's own text.

    Returns:
        The position in ``gap`` at which the model's own text begins, or None.
    """
    reached, matched = align_ignoring_whitespace(tail, gap)
    if reached == len(tail):
        return matched[reached]
    begin = len(tail) - len(profile.prompt)
    if not profile.prompt or not tail.endswith(profile.prompt):
        return None
    cuts = [begin + cut for cut in profile.prompt_cuts if begin + cut <= reached]
    return matched[cuts[-1]] if cuts else None


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
