"""What a template dropped or rewrote, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning_hub.data.conversation import BadRowError, Conversation
from lightning_hub.data.masking.sentinels import Segment, Traced

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
    rewritten = traced.rewritten()
    if rewritten:
        losses["texts rewritten"] += len(rewritten)
    return losses


def count_controls(conversation: Conversation, inside: Sequence[tuple[Segment, int]], marker: str) -> Counter[str]:
    """Count control tokens and end markers that stand inside texts: the model takes them for its own.

    Args:
        conversation: What was rendered.
        inside: Each text with the number of its control tokens.
        marker: What ends a turn in plain text; "" if nothing does.
    """
    notes: Counter[str] = Counter()
    if any(count for _, count in inside):
        notes["special tokens written out inside texts"] = 1
    said = {index for index, message in enumerate(conversation.messages) if message.role == "assistant"}
    if in_answers := sum(count for segment, count in inside if segment.turn in said):
        notes["special tokens inside the assistant's texts"] = in_answers
    if marker and any(marker in segment.text for segment, _ in inside):
        notes["end markers written out inside texts"] = 1
    return notes


def _loss_name(segment: Segment, role: str) -> str:
    if segment.kind == "text":
        return "system texts dropped" if role != "assistant" else "texts beside tool calls dropped"
    return f"{segment.kind if segment.kind == 'thoughts' else segment.kind + 's'} dropped"
