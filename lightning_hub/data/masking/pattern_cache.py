"""The fast way to the same masks: compare tokens with a pattern that the reference way has agreed to.

Conversations of the same roles differ, for most templates, in their texts only: the tokens between the texts are the
same in every row. The reference way (:mod:`lightning_hub.data.masking.reference`) masks the first rows of each such
roles, and what it finds between the texts becomes the pattern of that roles. A later row is masked by its pattern
only if every token between its texts equals the pattern's, no control token stands inside a text, and every text came
out; each other row takes the reference way. So a wrong guess costs time, never a mask.
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
from lightning_hub.ops.rows import IGNORED

AGREEING_EXAMPLES = 4
"""Rows of a roles that the reference way masks with the same pattern before the pattern is used."""

_CANDIDATES = 64
"""Skeletons of a roles that are kept in mind; texts that grow together with their surroundings make odd ones."""

RolePattern: TypeAlias = tuple[int | None, tuple[str, ...]]
"""Where the completion begins, and the roles."""


@dataclass(frozen=True)
class TokenPattern:
    """What surrounds the texts in every row of one roles.

    Attributes:
        gaps: The tokens before the first text, between texts, and after the last.
        trained: Trained stretches, each from (gap, token in it) to (gap, token in it).
    """

    gaps: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[TokenSpan, TokenSpan], ...]


class _PatternCandidates:
    """What has been seen of one roles."""

    def __init__(self) -> None:
        self.ready: TokenPattern | None = None
        self._seen: dict[tuple[tuple[int, ...], ...], tuple[TokenPattern, int]] = {}
        self._ambiguous = False

    def note(self, pattern: TokenPattern) -> None:
        """Count a pattern; the same surroundings with another mask end the fast way for this roles."""
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
    """One row masked by a pattern; the arrays are views of its batch."""

    ids: Ids
    labels: Ids
    text: str
    texts: list[int]
    """Tokens of each message's text."""


class PatternMasker:
    """Masks whole batches of plain conversations, and learns from the reference how.

    Args:
        reference: The reference.
    """

    def __init__(self, reference: ReferenceMasker) -> None:
        self.reference = reference
        self._learned: dict[RolePattern, _PatternCandidates] = {}
        self._is_off = reference.train_on == "all" or reference.profile.turn_end.appends
        added = list(reference.render.tokenizer.added_tokens_decoder)
        self._is_control = np.zeros(max([len(reference.render.tokenizer), *(index + 1 for index in added)]), dtype=bool)
        self._is_control[[*added, *reference.profile.controls]] = True

    def roles_of(self, conversation: Conversation) -> RolePattern | None:
        """The roles of a plain conversation; None for one that needs the reference whatever its tokens are."""
        if (
            conversation.tools
            or conversation.unmask
            or self.reference.train_on == "all"
            or self.reference.profile.turn_end.appends
        ):
            return None
        for message in conversation.messages:
            special = message.reasoning or message.tool_calls or message.name or message.tool_call_id
            if special or message.train is not None or not message.content or message.content.isspace():
                return None
            if message.role == "assistant" and "</think>" in message.content:
                return None
        return conversation.completion_from, tuple(message.role for message in conversation.messages)

    def learn(self, roles: RolePattern, masked: MaskedConversation) -> None:
        """Take note of what the reference found in one row of a roles."""
        if not masked.dropped and not masked.appended and (pattern := self._pattern_of(masked)):
            self._learned.setdefault(roles, _PatternCandidates()).note(pattern)

    def _pattern_of(self, masked: MaskedConversation) -> TokenPattern | None:
        spans = [span for _, span in masked.texts]
        borders = [0, *(border for span in spans for border in span), len(masked.ids)]
        gaps = tuple(tuple(masked.ids[start:end]) for start, end in zip(borders[::2], borders[1::2], strict=True))
        usable = all(self._is_control[list(gap)].any() for gap in gaps[1:]) and borders == sorted(borders)
        trained = []
        for start, end in masked.trained:
            first, last = _in_gap(start, borders), _in_gap(end, borders)
            if first is None or last is None:
                return None
            trained.append((first, last))
        return TokenPattern(gaps, tuple(trained)) if usable and self._is_control[list(gaps[0])].any() else None

    def __call__(
        self, conversations: Sequence[Conversation], patterns: Sequence[RolePattern]
    ) -> list[PatternMasked | None]:
        """Mask a batch; None for each row that must take the reference way."""
        results: list[PatternMasked | None] = [None] * len(conversations)
        known = [
            number for number, roles in enumerate(patterns) if roles in self._learned and self._learned[roles].ready
        ]
        texts = self._render([conversations[number] for number in known])
        kept = [
            (number, text) for number, text in zip(known, texts, strict=True) if _all_in(conversations[number], text)
        ]
        if not kept:
            return results
        encoded = self.reference.backend.encode_batch_fast([text for _, text in kept], add_special_tokens=False)
        batch = _Batch([encoding.ids for encoding in encoded], self._is_control)
        by_shape: dict[RolePattern, list[int]] = {}
        for place, (number, _) in enumerate(kept):
            by_shape.setdefault(patterns[number], []).append(place)
        for roles, places in by_shape.items():
            if pattern := self._learned[roles].ready:
                batch.mask(np.array(places), pattern)
        for (number, text), row in zip(kept, batch.rows(), strict=True):
            if row is not None:
                results[number] = PatternMasked(*row[:2], text, row[2])
        return results

    def _render(self, conversations: Sequence[Conversation]) -> list[str]:
        """Render all; "" for all where the template raises on one, so that the reference finds out which."""
        if not conversations:
            return []
        turns = [plain_turns(conversation, self.reference.profile.dialect) for conversation in conversations]
        return self.reference.render.many(turns) or [""] * len(turns)


def _in_gap(token: int, borders: list[int]) -> TokenSpan | None:
    """Which gap a border of a trained stretch lies in, and how far."""
    for gap, (start, end) in enumerate(zip(borders[::2], borders[1::2], strict=True)):
        if start <= token <= end:
            return gap, token - start
    return None


def _all_in(conversation: Conversation, text: str) -> bool:
    """Whether every text came out, in order."""
    position = 0
    for message in conversation.messages:
        core = message.content.strip()
        position = text.find(core, position)
        if position < 0:
            return False
        position += len(core)
    return bool(text)


class _Batch:
    """Rows end to end in one array, so that numpy looks at all of them at once."""

    def __init__(self, rows: list[list[int]], is_control: npt.NDArray[np.bool_]) -> None:
        self.ids: Ids = np.concatenate([np.array(row, dtype=np.int32) for row in rows])
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.offsets: Indices = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        self.controls: Indices = np.flatnonzero(is_control[self.ids])
        self.first_control = np.searchsorted(self.controls, self.offsets)
        self.is_control = is_control
        self.edges = np.zeros(len(self.ids) + 1, dtype=np.int8)
        self.texts: list[list[int] | None] = [None] * len(rows)

    def mask(self, rows: Indices, pattern: TokenPattern) -> None:
        """Mask those of these rows whose tokens between the texts are the pattern's."""
        inside = [np.flatnonzero(self.is_control[list(gap)]) for gap in pattern.gaps]
        total = sum(map(len, inside))
        rows = rows[np.diff(self.first_control)[rows] == total]
        if not len(rows):
            return
        anchors = self.first_control[rows]
        begins = np.empty((len(rows), len(pattern.gaps)), dtype=np.int64)
        for gap, controls in enumerate(inside):
            begins[:, gap] = self.controls[anchors] - controls[0]
            anchors = anchors + len(controls)
        agreed = self._agree(rows, begins, pattern)
        rows, begins = rows[agreed], begins[agreed]
        for (gap, token), (last_gap, last_token) in pattern.trained:
            self.edges[begins[:, gap] + token] += 1
            self.edges[begins[:, last_gap] + last_token] -= 1
        ends = begins + np.array([len(gap) for gap in pattern.gaps])
        for row, lengths in zip(rows, (begins[:, 1:] - ends[:, :-1]).tolist(), strict=True):
            self.texts[row] = lengths

    def _agree(self, rows: Indices, begins: Indices, pattern: TokenPattern) -> npt.NDArray[np.bool_]:
        """Compare all tokens between the texts; rows must begin with the first gap and end with the last."""
        agreed: npt.NDArray[np.bool_] = begins[:, 0] == self.offsets[rows]
        agreed &= begins[:, -1] + len(pattern.gaps[-1]) == self.offsets[rows + 1]
        previous = begins[:, 0] + len(pattern.gaps[0])
        for gap, tokens in enumerate(pattern.gaps):
            places = np.clip(begins[:, gap, None] + np.arange(len(tokens)), 0, len(self.ids) - 1)
            agreed &= (self.ids[places] == np.array(tokens, dtype=np.int32)).all(axis=1)
            if gap:
                agreed &= begins[:, gap] >= previous
                previous = begins[:, gap] + len(tokens)
        return agreed

    def rows(self) -> list[tuple[Ids, Ids, list[int]] | None]:
        """The ids, labels and text lengths of each masked row."""
        labels = np.where(np.cumsum(self.edges[:-1]) > 0, self.ids, np.int32(IGNORED)).astype(np.int32)
        labels[self.offsets[:-1]] = IGNORED
        return [
            None if texts is None else (self.ids[start:end], labels[start:end], texts)
            for texts, start, end in zip(self.texts, self.offsets.tolist(), self.offsets[1:].tolist(), strict=False)
        ]
