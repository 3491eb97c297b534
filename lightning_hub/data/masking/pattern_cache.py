"""The fast way to the same masks: compare tokens with a skeleton that the reference way has agreed to.

Conversations of the same roles differ, for most templates, in their texts only: the tokens between the texts are the
same in every row. The reference way (:mod:`lightning_hub.data.masking.reference`) masks the first rows of each such
shape, and what it finds between the texts becomes the skeleton of that shape. A later row is masked by its skeleton
only if every token between its texts equals the skeleton's, no control token stands inside a text, and every text came
out; each other row takes the reference way. So a wrong guess costs time, never a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_hub.data.conversation import Conversation
from lightning_hub.data.masking.reference import Masked, Span, TurnFinder
from lightning_hub.data.masking.sentinels import plain_turns
from lightning_hub.data.sample_store import Ids, Indices
from lightning_hub.ops.rows import IGNORED

AGREEING_ROWS = 4
"""Rows of a shape that the reference way masks with the same skeleton before the skeleton is used."""

_CANDIDATES = 64
"""Skeletons of a shape that are kept in mind; texts that grow together with their surroundings make odd ones."""

Shape: TypeAlias = tuple[int | None, tuple[str, ...]]
"""Where the completion begins, and the roles."""


@dataclass(frozen=True)
class Skeleton:
    """What surrounds the texts in every row of one shape.

    Attributes:
        gaps: The tokens before the first text, between texts, and after the last.
        trained: Trained stretches, each from (gap, token in it) to (gap, token in it).
    """

    gaps: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[Span, Span], ...]


class _Habits:
    """What has been seen of one shape."""

    def __init__(self) -> None:
        self.ready: Skeleton | None = None
        self._seen: dict[tuple[tuple[int, ...], ...], tuple[Skeleton, int]] = {}
        self._ambiguous = False

    def note(self, skeleton: Skeleton) -> None:
        """Count a skeleton; the same surroundings with another mask end the fast way for this shape."""
        known, times = self._seen.get(skeleton.gaps, (skeleton, 0))
        self._ambiguous |= known != skeleton
        if times or len(self._seen) < _CANDIDATES:
            self._seen[skeleton.gaps] = known, times + 1
        if self._ambiguous:
            self.ready = None
        elif self.ready is None and times + 1 >= AGREEING_ROWS:
            self.ready = skeleton


@dataclass(slots=True)
class FastMasked:
    """One row masked by a skeleton; the arrays are views of its batch."""

    ids: Ids
    labels: Ids
    text: str
    texts: list[int]
    """Tokens of each message's text."""


class FastMasker:
    """Masks whole batches of plain conversations, and learns from the reference how.

    Args:
        finder: The reference.
    """

    def __init__(self, finder: TurnFinder) -> None:
        self.finder = finder
        self._learned: dict[Shape, _Habits] = {}
        self._is_off = finder.train_on == "all" or finder.profile.turn_end.appends
        added = list(finder.render.tokenizer.added_tokens_decoder)
        self._is_control = np.zeros(max([len(finder.render.tokenizer), *(index + 1 for index in added)]), dtype=bool)
        self._is_control[[*added, *finder.profile.controls]] = True

    def shape_of(self, conversation: Conversation) -> Shape | None:
        """The shape of a plain conversation; None for one that needs the reference whatever its tokens are."""
        if (
            conversation.tools
            or conversation.unmask
            or self.finder.train_on == "all"
            or self.finder.profile.turn_end.appends
        ):
            return None
        for message in conversation.messages:
            special = message.reasoning or message.tool_calls or message.name or message.tool_call_id
            if special or message.train is not None or not message.content or message.content.isspace():
                return None
            if message.role == "assistant" and "</think>" in message.content:
                return None
        return conversation.completion_from, tuple(message.role for message in conversation.messages)

    def learn(self, shape: Shape, masked: Masked) -> None:
        """Take note of what the reference found in one row of a shape."""
        if not masked.losses and not masked.appended and (skeleton := self._skeleton(masked)):
            self._learned.setdefault(shape, _Habits()).note(skeleton)

    def _skeleton(self, masked: Masked) -> Skeleton | None:
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
        return Skeleton(gaps, tuple(trained)) if usable and self._is_control[list(gaps[0])].any() else None

    def __call__(self, conversations: Sequence[Conversation], shapes: Sequence[Shape]) -> list[FastMasked | None]:
        """Mask a batch; None for each row that must take the reference way."""
        results: list[FastMasked | None] = [None] * len(conversations)
        known = [number for number, shape in enumerate(shapes) if shape in self._learned and self._learned[shape].ready]
        texts = self._render([conversations[number] for number in known])
        kept = [
            (number, text) for number, text in zip(known, texts, strict=True) if _all_in(conversations[number], text)
        ]
        if not kept:
            return results
        encoded = self.finder.backend.encode_batch_fast([text for _, text in kept], add_special_tokens=False)
        batch = _Batch([encoding.ids for encoding in encoded], self._is_control)
        by_shape: dict[Shape, list[int]] = {}
        for place, (number, _) in enumerate(kept):
            by_shape.setdefault(shapes[number], []).append(place)
        for shape, places in by_shape.items():
            if skeleton := self._learned[shape].ready:
                batch.mask(np.array(places), skeleton)
        for (number, text), row in zip(kept, batch.rows(), strict=True):
            if row is not None:
                results[number] = FastMasked(*row[:2], text, row[2])
        return results

    def _render(self, conversations: Sequence[Conversation]) -> list[str]:
        """Render all; "" for all where the template raises on one, so that the reference finds out which."""
        if not conversations:
            return []
        turns = [plain_turns(conversation, self.finder.profile.shape) for conversation in conversations]
        return self.finder.render.many(turns) or [""] * len(turns)


def _in_gap(token: int, borders: list[int]) -> Span | None:
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

    def mask(self, rows: Indices, skeleton: Skeleton) -> None:
        """Mask those of these rows whose tokens between the texts are the skeleton's."""
        inside = [np.flatnonzero(self.is_control[list(gap)]) for gap in skeleton.gaps]
        total = sum(map(len, inside))
        rows = rows[np.diff(self.first_control)[rows] == total]
        if not len(rows):
            return
        anchors = self.first_control[rows]
        begins = np.empty((len(rows), len(skeleton.gaps)), dtype=np.int64)
        for gap, controls in enumerate(inside):
            begins[:, gap] = self.controls[anchors] - controls[0]
            anchors = anchors + len(controls)
        agreed = self._agree(rows, begins, skeleton)
        rows, begins = rows[agreed], begins[agreed]
        for (gap, token), (last_gap, last_token) in skeleton.trained:
            self.edges[begins[:, gap] + token] += 1
            self.edges[begins[:, last_gap] + last_token] -= 1
        ends = begins + np.array([len(gap) for gap in skeleton.gaps])
        for row, lengths in zip(rows, (begins[:, 1:] - ends[:, :-1]).tolist(), strict=True):
            self.texts[row] = lengths

    def _agree(self, rows: Indices, begins: Indices, skeleton: Skeleton) -> npt.NDArray[np.bool_]:
        """Compare all tokens between the texts; rows must begin with the first gap and end with the last."""
        agreed: npt.NDArray[np.bool_] = begins[:, 0] == self.offsets[rows]
        agreed &= begins[:, -1] + len(skeleton.gaps[-1]) == self.offsets[rows + 1]
        previous = begins[:, 0] + len(skeleton.gaps[0])
        for gap, tokens in enumerate(skeleton.gaps):
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
