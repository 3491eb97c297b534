"""Caches the token pattern between messages: an example that matches the pattern is masked without searching.

With most templates, conversations with the same roles differ in their texts only: the tokens between the texts are the
same in every example. The reference (`masking.reference`) masks the first examples of each sequence of roles. What it
finds between the texts becomes the pattern of these roles. A later example is masked by the pattern only if every token
between its texts equals the pattern, no control token is inside a text, and every text was rendered. All other examples
are masked by the reference. So a wrong guess costs time, never a wrong mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_hub.data.conversation import Conversation
from lightning_hub.data.masking.reference import MaskedConversation, ReferenceMasker, TokenSpan
from lightning_hub.data.masking.sentinels import plain_turns
from lightning_hub.data.sample_store import Ids, Indices
from lightning_hub.ops.batch import IGNORE_INDEX

AGREEING_EXAMPLES = 4
"""Examples of the same roles that the reference must mask with the same pattern before the pattern is used."""

_CANDIDATES = 64
"""The most patterns that are remembered for the same roles."""

RolePattern: TypeAlias = tuple[int | None, tuple[str, ...]]
"""The turn at which the completion begins, if any, and the roles of all turns."""


@dataclass(frozen=True)
class TokenPattern:
    """The tokens around the texts, in every example with the same roles.

    Attributes:
        gaps: The tokens before the first text, between texts, and after the last.
        trained: Trained spans, each from (gap, token in it) to (gap, token in it).
    """

    gaps: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[TokenSpan, TokenSpan], ...]


class _PatternCandidates:
    """The patterns that were seen for one sequence of roles."""

    def __init__(self) -> None:
        self.ready: TokenPattern | None = None
        self._seen: dict[tuple[tuple[int, ...], ...], tuple[TokenPattern, int]] = {}
        self._ambiguous = False

    def note(self, pattern: TokenPattern) -> None:
        """Count a pattern; equal gaps with two different masks switch the patterns off for these roles."""
        known, times = self._seen.get(pattern.gaps, (pattern, 0))
        self._ambiguous |= known != pattern
        if times or len(self._seen) < _CANDIDATES:
            self._seen[pattern.gaps] = known, times + 1
        if self._ambiguous:
            self.ready = None
        elif self.ready is None and times + 1 >= AGREEING_EXAMPLES:
            self.ready = pattern


@dataclass(slots=True)
class PatternMasked:
    """One example masked by a pattern; the arrays are views of its batch.

    Attributes:
        ids: Token ids, int32, shape ``(tokens,)``.
        labels: The ids where a token is trained, else ``IGNORE_INDEX``, the same shape.
        text: The rendering.
        texts: The number of tokens of each message's text.
    """

    ids: Ids
    labels: Ids
    text: str
    texts: list[int]


class PatternMasker:
    """Masks batches of plain conversations by patterns that it learns from the reference.

    Args:
        reference: Masks any conversation.
    """

    def __init__(self, reference: ReferenceMasker) -> None:
        self.reference = reference
        self._learned: dict[RolePattern, _PatternCandidates] = {}
        self._is_off = reference.train_on == "all" or reference.profile.turn_end.appends
        added = list(reference.render.tokenizer.added_tokens_decoder)
        self._is_control = np.zeros(max([len(reference.render.tokenizer), *(index + 1 for index in added)]), dtype=bool)
        self._is_control[[*added, *reference.profile.controls]] = True

    def roles_of(self, conversation: Conversation) -> RolePattern | None:
        """The roles of a plain conversation; None if only the reference can mask it."""
        if conversation.tools or conversation.unmask or self._is_off:
            return None
        for message in conversation.messages:
            special = message.reasoning or message.tool_calls or message.name or message.tool_call_id
            if special or message.train is not None or not message.content or message.content.isspace():
                return None
            if message.role == "assistant" and "</think>" in message.content:
                return None
        return conversation.completion_from, tuple(message.role for message in conversation.messages)

    def learn(self, roles: RolePattern, masked: MaskedConversation) -> None:
        """Learn the pattern of one example that the reference has masked."""
        if not masked.dropped and not masked.appended and (pattern := self._pattern_of(masked)):
            self._learned.setdefault(roles, _PatternCandidates()).note(pattern)

    def _pattern_of(self, masked: MaskedConversation) -> TokenPattern | None:
        spans = [span for _, span in masked.texts]
        edges = [0, *(edge for span in spans for edge in span), len(masked.ids)]
        gaps = tuple(tuple(masked.ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True))
        usable = all(self._is_control[list(gap)].any() for gap in gaps) and edges == sorted(edges)
        trained = []
        for start, end in masked.trained:
            first, last = _in_gap(start, edges), _in_gap(end, edges)
            if first is None or last is None:
                return None
            trained.append((first, last))
        return TokenPattern(gaps, tuple(trained)) if usable else None

    def __call__(
        self, conversations: Sequence[Conversation], roles: Sequence[RolePattern]
    ) -> list[PatternMasked | None]:
        """Mask a batch; None for each example that the reference must mask."""
        results: list[PatternMasked | None] = [None] * len(conversations)
        known = [index for index, own in enumerate(roles) if own in self._learned and self._learned[own].ready]
        texts = self._render([conversations[index] for index in known])
        rendered = [
            (index, text) for index, text in zip(known, texts, strict=True) if _all_in(conversations[index], text)
        ]
        if not rendered:
            return results
        encoded = self.reference.backend.encode_batch_fast([text for _, text in rendered], add_special_tokens=False)
        batch = _Batch([encoding.ids for encoding in encoded], self._is_control)
        by_roles: dict[RolePattern, list[int]] = {}
        for position, (index, _) in enumerate(rendered):
            by_roles.setdefault(roles[index], []).append(position)
        for own, positions in by_roles.items():
            if pattern := self._learned[own].ready:
                batch.mask(np.array(positions), pattern)
        for (index, text), masked in zip(rendered, batch.masked(), strict=True):
            if masked is not None:
                ids, labels, text_lengths = masked
                results[index] = PatternMasked(ids, labels, text, text_lengths)
        return results

    def _render(self, conversations: Sequence[Conversation]) -> list[str]:
        """Render all; "" for all if the template raises for one of them: the reference then finds out for which."""
        if not conversations:
            return []
        turns = [plain_turns(conversation, self.reference.profile.dialect) for conversation in conversations]
        return self.reference.render.many(turns) or [""] * len(turns)


def _in_gap(token: int, edges: list[int]) -> TokenSpan | None:
    """The gap that contains one end of a trained span, and the position in it."""
    for gap, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        if start <= token <= end:
            return gap, token - start
    return None


def _all_in(conversation: Conversation, text: str) -> bool:
    """Whether every text is in the rendering, in order."""
    position = 0
    for message in conversation.messages:
        core = message.content.strip()
        position = text.find(core, position)
        if position < 0:
            return False
        position += len(core)
    return bool(text)


class _Batch:
    """Conversations end to end in one array, so that numpy compares all of them at once.

    Attributes:
        ids: All token ids, int32, shape ``(tokens,)``.
        offsets: The first token of each conversation, and the end of the last, int64, shape ``(conversations + 1,)``.
        controls: The positions of all control tokens, int64, shape ``(control tokens,)``.
        first_control: The index into ``controls`` of the first control token of each conversation, int64, shape
            ``(conversations + 1,)``.
        changes: The mask as a difference array, int8, shape ``(tokens + 1,)``: +1 where a trained span begins, -1 where
            it ends. The running sum is 1 for trained tokens and 0 for others.
        texts: The number of tokens of each text of a masked conversation; None for one that is not masked.
    """

    def __init__(self, conversations: list[list[int]], is_control: npt.NDArray[np.bool_]) -> None:
        self.ids: Ids = np.concatenate([np.array(ids, dtype=np.int32) for ids in conversations])
        lengths = np.array([len(ids) for ids in conversations], dtype=np.int64)
        self.offsets: Indices = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        self.controls: Indices = np.flatnonzero(is_control[self.ids])
        self.first_control = np.searchsorted(self.controls, self.offsets)
        self.is_control = is_control
        self.changes = np.zeros(len(self.ids) + 1, dtype=np.int8)
        self.texts: list[list[int] | None] = [None] * len(conversations)

    def mask(self, chosen: Indices, pattern: TokenPattern) -> None:
        """Mask those of the chosen conversations whose tokens between the texts equal the pattern.

        Args:
            chosen: Numbers of conversations, int64, shape ``(chosen,)``.
            pattern: The pattern of their roles.
        """
        controls_of_gap = [np.flatnonzero(self.is_control[list(gap)]) for gap in pattern.gaps]
        total = sum(map(len, controls_of_gap))
        chosen = chosen[np.diff(self.first_control)[chosen] == total]
        if not len(chosen):
            return
        next_control = self.first_control[chosen]
        starts = np.empty((len(chosen), len(pattern.gaps)), dtype=np.int64)  # the first token of each gap
        for gap, controls in enumerate(controls_of_gap):
            starts[:, gap] = self.controls[next_control] - controls[0]
            next_control = next_control + len(controls)
        equal = self._equals(chosen, starts, pattern)
        chosen, starts = chosen[equal], starts[equal]
        for (gap, token), (last_gap, last_token) in pattern.trained:
            self.changes[starts[:, gap] + token] += 1
            self.changes[starts[:, last_gap] + last_token] -= 1
        ends = starts + np.array([len(gap) for gap in pattern.gaps])
        for number, lengths in zip(chosen, (starts[:, 1:] - ends[:, :-1]).tolist(), strict=True):
            self.texts[number] = lengths

    def _equals(self, chosen: Indices, starts: Indices, pattern: TokenPattern) -> npt.NDArray[np.bool_]:
        """Compare all tokens between the texts; the first gap must begin a conversation, and the last must end it.

        Args:
            chosen: Numbers of conversations, int64, shape ``(chosen,)``.
            starts: The first token of each gap, int64, shape ``(chosen, gaps)``.
            pattern: The tokens of the gaps.

        Returns:
            Whether each conversation matches, bool, shape ``(chosen,)``.
        """
        equal: npt.NDArray[np.bool_] = starts[:, 0] == self.offsets[chosen]
        equal &= starts[:, -1] + len(pattern.gaps[-1]) == self.offsets[chosen + 1]
        previous_end = starts[:, 0] + len(pattern.gaps[0])
        for gap, tokens in enumerate(pattern.gaps):
            positions = np.clip(starts[:, gap, None] + np.arange(len(tokens)), 0, len(self.ids) - 1)
            equal &= (self.ids[positions] == np.array(tokens, dtype=np.int32)).all(axis=1)
            if gap:
                equal &= starts[:, gap] >= previous_end
                previous_end = starts[:, gap] + len(tokens)
        return equal

    def masked(self) -> list[tuple[Ids, Ids, list[int]] | None]:
        """The ids and labels (int32, shape ``(tokens,)``) and the text lengths of each masked conversation."""
        is_trained = np.cumsum(self.changes[:-1]) > 0
        labels = np.where(is_trained, self.ids, np.int32(IGNORE_INDEX)).astype(np.int32)
        labels[self.offsets[:-1]] = IGNORE_INDEX
        return [
            None if texts is None else (self.ids[start:end], labels[start:end], texts)
            for texts, start, end in zip(self.texts, self.offsets.tolist(), self.offsets[1:].tolist(), strict=False)
        ]
