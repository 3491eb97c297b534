"""The reference way to a mask: find, in the rendered text itself, what the model would have said in each turn.

Trained is what the model itself would have produced after the generation prompt, up to and including the token at
which it would stop, and nothing else. Nothing is inferred from prefixes of the conversation unless it is found again
in the rendering of the whole one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_hub.data.conversation import BadRowError, Conversation, Role
from lightning_hub.data.masking.alignment import align
from lightning_hub.data.masking.chat_template import Renderer, TemplateRefusal
from lightning_hub.data.masking.dropped_text import count_controls, count_losses
from lightning_hub.data.masking.selection import wanted_turns
from lightning_hub.data.masking.sentinels import Marker, Place, Segment, Traced, choose_alphabet, trace
from lightning_hub.data.masking.template_profile import Backend, Profile
from lightning_hub.data.settings import TrainOn

Span = tuple[int, int]
"""Tokens from the first up to, not including, the second."""


@dataclass(slots=True)
class Masked:
    """A conversation as tokens.

    Attributes:
        text: The rendering.
        ids: Its tokens.
        trained: Stretches of trained tokens, in order.
        texts: The tokens of each message's texts with its role.
        losses: What the template dropped or rewrote, by name.
        appended: Whether an end token was added that the template does not write.
    """

    text: str
    ids: list[int]
    trained: list[Span]
    texts: list[tuple[Role, Span]]
    losses: Counter[str] = field(default_factory=Counter)
    appended: bool = False


class TurnFinder:
    """Masks conversations one by one, for any template.

    Args:
        render: The template.
        backend: The tokenizer's engine.
        profile: What is known of the template.
        train_on: Which turns are trained.
    """

    def __init__(self, render: Renderer, backend: Backend, profile: Profile, train_on: TrainOn) -> None:
        self.render = render
        self.backend = backend
        self.profile = profile
        self.train_on = train_on

    def __call__(self, conversation: Conversation) -> Masked:
        """Render, encode and mask one conversation.

        Raises:
            BadRowError: The template refuses it, loses its turns or its calls, or a turn cannot be found for certain.
        """
        try:
            return _Search(self, conversation).masked()
        except TemplateRefusal as error:
            raise BadRowError(f"the chat template refuses this conversation: {error}") from error


class _Search:
    """The work on one conversation."""

    def __init__(self, finder: TurnFinder, conversation: Conversation) -> None:
        self.render, self.profile, self.train_on = finder.render, finder.profile, finder.train_on
        self.backend = finder.backend
        self.conversation = conversation
        self.plain_turns, self.plain_tools = Marker(self.profile.shape).conversation(conversation)
        text = self.render(self.plain_turns, self.plain_tools)
        self.alphabet = choose_alphabet(text)
        self.traced = self._trace(text)
        self.places = self.traced.places
        encoding = self.backend.encode(text, add_special_tokens=False)
        self.ids = list(encoding.ids)
        if not self.ids:
            raise BadRowError("the chat template writes nothing for this conversation")
        self.starts = [start for start, _ in encoding.offsets]

    def _trace(self, text: str) -> Traced:
        for only_ends in (False, True):
            marker = Marker(self.profile.shape, self.alphabet, only_ends=only_ends)
            self.turns, self.tools = marker.conversation(self.conversation)
            self.segments = marker.segments
            try:
                traced = trace(self.render(self.turns, self.tools), self.segments, self.alphabet)
            except TemplateRefusal:
                continue
            if traced.text == text:
                return traced
        raise BadRowError("the chat template changes the texts of this conversation, so that its turns cannot be found")

    def masked(self) -> Masked:
        losses = count_losses(self.conversation, self.traced)
        texts: list[tuple[Place, Span]] = []
        for place in self.places:
            start, end = self._text_span(place)
            before = texts[-1][1][1] if texts else 0
            texts.append((place, (max(start, before), max(end, before))))
        controls = self.profile.controls
        inside = [(p.segment, sum(id in controls for id in self.ids[slice(*span)])) for p, span in texts]
        losses += count_controls(self.conversation, inside, self.profile.turn_end.text)
        self._check_calls()
        appended = self._append_end()
        trained = self._trained(losses)
        roles = [
            (self.conversation.messages[place.segment.turn].role, span)
            for place, span in texts
            if place.segment.turn >= 0
        ]
        return Masked(self.traced.text, self.ids, _merged(trained), roles, losses, appended)

    def _check_calls(self) -> None:
        """Refuse a call that is written twice; only after the end of its turn may its name stand once more.

        Raises:
            BadRowError: A part of a call is repeated in its own turn, or a part other than the name anywhere.
        """
        for place in self.places:
            turn = place.segment.turn
            if not place.again:
                continue
            names = [call.name.strip() for call in self.conversation.messages[turn].tool_calls] if turn >= 0 else []
            ended = max(self._last_character(turn), place.end)
            stop = self._stop(turn) or self._open_end(turn)
            ended = max(ended, self.starts[stop - 1] if stop else 0)
            if place.segment.text not in names or min(place.again) <= ended:
                raise BadRowError(f"the chat template repeats the tool call of turn {turn + 1}")

    def _append_end(self) -> bool:
        """End a last turn that the template leaves open, so that the model learns to stop."""
        message = self.conversation.messages[-1]
        if message.role != "assistant" or self._stop(len(self.conversation.messages) - 1):
            return False
        turn_end = self.profile.turn_end
        token = turn_end.after_call if message.tool_calls else turn_end.token
        if token is None:
            raise BadRowError("no end token is known: the tokenizer has no eos token and the template writes none")
        keep = self._token(len(self.traced.text.rstrip()))
        self.ids[keep:] = [token]
        self.starts[keep:] = [len(self.traced.text)]
        return True

    def _trained(self, losses: Counter[str]) -> list[Span]:
        messages = self.conversation.messages
        everything = self.train_on == "all" or self.conversation.unmask
        if not everything:
            return [self._turn(index, losses) for index in wanted_turns(self.conversation, self.train_on)]
        hidden = [self._turn(i, losses) for i, m in enumerate(messages) if m.train is False and m.role == "assistant"]
        for place in self.places:
            message = messages[place.segment.turn] if place.segment.turn >= 0 else None
            silent = message is not None and message.train is False and message.role != "assistant"
            system = message is not None and message.role in ("system", "developer") and self.train_on != "all"
            if silent or system:
                hidden.append((self._token(place.start), self._token(place.end)))
        return _without((0 if self.train_on == "all" else self._after_system(), len(self.ids)), hidden)

    def _after_system(self) -> int:
        """The first token that is not the system's: where the header of the first other turn begins."""
        for place in self.places:
            turn = place.segment.turn
            if turn >= 0 and self.conversation.messages[turn].role not in ("system", "developer"):
                header = self.profile.user_header
                opened = self.traced.text.endswith(header, 0, place.start)
                return self._token(place.start - len(header) if opened else place.start)
        return 0

    def _turn(self, index: int, losses: Counter[str]) -> Span:
        """The trained tokens of one assistant turn."""
        start, stop = self._first_said(self._start(index)), self._stop(index)
        if stop is None:
            losses["turns that the template ends with no stop token"] += 1
            stop = self._open_end(index)
        return start, max(start, stop)

    def _token(self, character: int) -> int:
        """The first token that begins at this character or later."""
        return bisect_left(self.starts, character)

    def _first_said(self, character: int) -> int:
        """The first token of a text; one that begins with the blank before the text carries its first word too."""
        token = self._token(character)
        blank = self.traced.text[self.starts[token - 1] : character] if token else ""
        straddles = token == len(self.ids) or self.starts[token] > character
        return token - 1 if straddles and blank and not blank.strip(" ") else token

    def _text_span(self, place: Place) -> Span:
        """The tokens of a text, for counting: blanks beside it count with it, however they were cut into tokens."""
        start, end = self._first_said(place.start), self._token(place.end)
        while start and self._is_blank(start - 1):
            start -= 1
        while end < len(self.ids) and self._is_blank(end):
            end += 1
        return start, end

    def _is_blank(self, token: int) -> bool:
        next_start = self.starts[token + 1] if token + 1 < len(self.ids) else len(self.traced.text)
        text = self.traced.text[self.starts[token] : next_start]
        return bool(text) and not text.strip(" ")

    def _own(self, index: int) -> list[Place]:
        return [place for place in self.places if place.segment.turn == index]

    def _next(self, index: int, after: int) -> int:
        """Where the text of a later turn begins."""
        later = (place.start for place in self.places if place.segment.turn > index and place.start >= after)
        return min(later, default=len(self.traced.text) + 1)

    def _last_character(self, index: int) -> int:
        own = self._own(index)
        return max(place.end for place in own) if own else self._start(index)

    def _stop(self, index: int) -> int | None:
        """One past the first token after the turn's texts at which generation stops."""
        after = self._last_character(index)
        limit = self._next(index, after)
        for token in range(self._token(after), len(self.ids)):
            if self.starts[token] >= limit:
                break
            if self.ids[token] in self.profile.turn_end.stops:
                return token + 1
        return None

    def _open_end(self, index: int) -> int:
        """Where a turn ends that no stop token closes: after its marker, else before the next special token."""
        after = self._last_character(index)
        first = self._token(after)
        turn_end = self.profile.turn_end
        if self.conversation.messages[index].tool_calls and turn_end.call_text:
            begins = self.traced.text.rfind(turn_end.call_text, after, self._next(index, after))
            if begins >= 0:
                return self._token(begins + len(turn_end.call_text))
        if turn_end.text and self.traced.text.startswith(turn_end.text, after):
            return self._token(after + len(turn_end.text))
        limit = self._token(self._next(index, self._last_character(index)))
        special = (token for token in range(first, limit) if self.ids[token] in self.profile.specials)
        return next(special, first)

    def _start(self, index: int) -> int:
        """The character at which the model takes over from the generation prompt."""
        own = self._own(index)
        limit = min(place.start for place in own) if own else self._next(index, 0)
        earlier = [place for place in self.places if place.segment.turn < index and place.end <= limit]
        previous = max(earlier, key=lambda place: place.end, default=None)
        gap_start = previous.end if previous else 0
        gap = self.traced.text[gap_start : min(limit, len(self.traced.text))]
        tail = self._prompt_tail(index, previous.segment if previous else None)
        begun = self._find_prompt(gap) if tail is None else self._align(tail, gap)
        if begun is None:
            raise BadRowError(f"turn {index + 1} does not begin as the template's generation prompt does")
        return gap_start + begun

    def _prompt_tail(self, index: int, previous: Segment | None) -> str | None:
        """What the template writes between the last text before a turn and the model's first token."""
        if index == 0:
            return None
        try:
            prompt = self.render(self.turns[:index], self.tools, add_generation_prompt=True)
        except TemplateRefusal:
            return None
        traced = trace(prompt, self.segments, self.alphabet)
        last = max(traced.places, key=lambda place: place.end, default=None)
        return traced.tail() if (last.segment if last else None) is previous else None

    def _find_prompt(self, gap: str) -> int | None:
        """Look for the longest beginning of the generation prompt, cut between its tokens."""
        if not self.profile.prompt:
            return len(gap)
        for cut in reversed(self.profile.prompt_cuts):
            found = gap.rfind(self.profile.prompt[:cut])
            if found >= 0:
                return found + cut
        return None

    def _align(self, tail: str, gap: str) -> int | None:
        """Lay the generation prompt over what the whole rendering has in its place."""
        reached, matched = align(tail, gap)
        if reached == len(tail):
            return matched[reached]
        begin = len(tail) - len(self.profile.prompt)
        if not self.profile.prompt or not tail.endswith(self.profile.prompt):
            return None
        cuts = [begin + cut for cut in self.profile.prompt_cuts if begin + cut <= reached]
        return matched[cuts[-1]] if cuts else None


def _merged(spans: Sequence[Span]) -> list[Span]:
    return [span for span in sorted(spans) if span[0] < span[1]]


def _without(whole: Span, holes: Sequence[Span]) -> list[Span]:
    """A span minus others."""
    kept, position = [], whole[0]
    for start, end in sorted(holes):
        if start > position:
            kept.append((position, start))
        position = max(position, end)
    return [*kept, (position, whole[1])]
