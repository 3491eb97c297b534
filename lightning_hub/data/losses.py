"""What a template dropped or rewrote, by name."""

from __future__ import annotations

from collections import Counter

from lightning_hub.data.conversation import BadRowError, Conversation
from lightning_hub.data.marks import Segment, Traced

CHARACTERS = ", characters"
"""Ends the name of a count of characters; without it, the count is of texts."""


def count_losses(conversation: Conversation, traced: Traced) -> Counter[str]:
    """Count what the template lost by name; refuse the row where a turn or a call is gone.

    Raises:
        BadRowError: What is missing is part of what the model must see or say.
    """
    losses: Counter[str] = Counter()
    present = {place.segment.turn for place in traced.places}
    for segment in traced.lost():
        role = conversation.messages[segment.turn].role if segment.turn >= 0 else "tool"
        vital = segment.kind == "tool call" or (segment.kind == "text" and role not in ("system", "developer"))
        if vital and not (segment.kind == "text" and role == "assistant" and segment.turn in present):
            raise BadRowError(f"the chat template leaves out the {segment.kind} of turn {segment.turn + 1} ({role})")
        losses[_loss_name(segment, role)] += 1
        losses[_loss_name(segment, role) + CHARACTERS] += len(segment.text)
    for place in traced.places:
        if place.times > 1 and place.segment.kind == "tool call":
            raise BadRowError(f"the chat template repeats the tool call of turn {place.segment.turn + 1}")
    rewritten = traced.rewritten()
    if rewritten:
        losses["texts rewritten"] += len(rewritten)
    return losses


def _loss_name(segment: Segment, role: str) -> str:
    if segment.kind == "text":
        return "system texts dropped" if role != "assistant" else "texts beside tool calls dropped"
    return f"{segment.kind if segment.kind == 'thoughts' else segment.kind + 's'} dropped"
