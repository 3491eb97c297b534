"""Counts the texts that a template dropped or rewrote, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning_hub.data.conversation import BadExampleError, Conversation
from lightning_hub.data.masking.sentinels import LocatedTexts, MarkedText

CHARACTERS = ", characters"
"""Ends the name of a count of characters; without it, the count is of texts."""


def count_dropped_text(conversation: Conversation, located: LocatedTexts) -> Counter[str]:
    """Count what the template dropped, by name; refuse the example if a turn or a tool call is missing.

    Raises:
        BadExampleError: A turn or a tool call is missing in the rendering.
    """
    dropped: Counter[str] = Counter()
    present = {span.marked_text.turn for span in located.spans}
    for marked_text in located.missing():
        role = conversation.messages[marked_text.turn].role if marked_text.turn >= 0 else "tool"
        required = marked_text.kind == "tool call" or (
            marked_text.kind == "text" and role not in ("system", "developer")
        )
        if required and not (marked_text.kind == "text" and role == "assistant" and marked_text.turn in present):
            raise BadExampleError(
                f"the chat template leaves out the {marked_text.kind} of turn {marked_text.turn + 1} ({role})"
            )
        dropped[_dropped_name(marked_text, role)] += 1
        dropped[_dropped_name(marked_text, role) + CHARACTERS] += len(marked_text.text)
    rewritten = located.rewritten()
    if rewritten:
        dropped["texts rewritten"] += len(rewritten)
    return dropped


def count_controls(conversation: Conversation, inside: Sequence[tuple[MarkedText, int]], marker: str) -> Counter[str]:
    """Count control tokens and end markers that are written inside texts: the model reads them as control tokens.

    Args:
        conversation: What was rendered.
        inside: Each text with the number of its control tokens.
        marker: The plain text that ends a turn; "" if the template has none.
    """
    notes: Counter[str] = Counter()
    if any(count for _, count in inside):
        notes["special tokens written out inside texts"] = 1
    answers = {index for index, message in enumerate(conversation.messages) if message.role == "assistant"}
    if in_answers := sum(count for marked_text, count in inside if marked_text.turn in answers):
        notes["special tokens inside the assistant's texts"] = in_answers
    if marker and any(marker in marked_text.text for marked_text, _ in inside):
        notes["end markers written out inside texts"] = 1
    return notes


def _dropped_name(marked_text: MarkedText, role: str) -> str:
    if marked_text.kind == "text":
        return "system texts dropped" if role != "assistant" else "texts beside tool calls dropped"
    return f"{marked_text.kind if marked_text.kind == 'thoughts' else marked_text.kind + 's'} dropped"
