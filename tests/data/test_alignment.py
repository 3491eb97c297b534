"""A generation prompt is followed through other white space, and no further than the two agree."""

from __future__ import annotations

import pytest

from lightning_hub.data.masking.alignment import align_ignoring_whitespace


@pytest.mark.parametrize(
    ("tail", "gap", "reached", "place"),
    [
        ("<a>\n", "<a>\nyes", 4, 4),
        ("<a>\n", "\n    <a>\n    yes", 4, 9),
        ("<a>\n", "<a> yes", 4, 3),  # white space that is not the prompt's own is the model's to say
        ("<a><think>\n", "<a><think></think>yes", 11, 10),
        ("<a><think>\n", "<a>", 3, 3),
        ("<a>\n", "<b>\n", 1, 1),
        ("", "yes", 0, 0),
    ],
)
def test_align(tail: str, gap: str, reached: int, place: int) -> None:
    followed, matched = align_ignoring_whitespace(tail, gap)
    assert (followed, matched[followed]) == (reached, place)
