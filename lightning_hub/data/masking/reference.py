"""Finds the assistant tokens of a rendered conversation, for any chat template: the reference for all masks.

Trained are the tokens that the model itself would have produced after the generation prompt, up to and including the
token at which it would stop, and nothing else. Prefixes of the conversation are not enough: templates change earlier
turns when later ones follow (they remove reasoning, for example). So what a prefix shows counts only where it is found
again in the rendering of the full conversation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_hub.data.conversation import BadExampleError, Conversation, Role
from lightning_hub.data.masking.alignment import find_prompt, match_prompt
from lightning_hub.data.masking.chat_template import Renderer, TemplateRefusal
from lightning_hub.data.masking.dropped_text import count_controls, count_dropped_text
from lightning_hub.data.masking.selection import trained_turn_indices
from lightning_hub.data.masking.sentinels import (
    LocatedTexts,
    MarkedText,
    SentinelInserter,
    TextSpan,
    choose_block,
    locate_texts,
)
from lightning_hub.data.masking.template_profile import Backend, TemplateProfile
from lightning_hub.data.settings import TrainOn

TokenSpan = tuple[int, int]
"""The first token, and the token after the last."""


@dataclass(slots=True)
class MaskedConversation:
    """A conversation as tokens.

    Attributes:
        text: The rendering.
        ids: Its tokens.
        trained: Spans of trained tokens, in order.
        texts: The tokens of each message's texts with its role.
        dropped: What the template dropped or rewrote, by name.
        appended: Whether an end token was added that the template does not write.
    """

    text: str
    ids: list[int]
    trained: list[TokenSpan]
    texts: list[tuple[Role, TokenSpan]]
    dropped: Counter[str] = field(default_factory=Counter)
    appended: bool = False


class ReferenceMasker:
    """Masks conversations one by one, for any template.

    Args:
        render: The template.
        backend: The tokenizer's engine.
        profile: What is known of the template.
        train_on: Which turns are trained.
    """

    def __init__(self, render: Renderer, backend: Backend, profile: TemplateProfile, train_on: TrainOn) -> None:
        self.render = render
        self.backend = backend
        self.profile = profile
        self.train_on = train_on

    def __call__(self, conversation: Conversation) -> MaskedConversation:
        """Render, encode and mask one conversation.

        Raises:
            BadExampleError: The template refuses it or drops its turns or calls, or a turn cannot be found for certain.
        """
        try:
            return _ConversationMasker(self, conversation).mask()
        except TemplateRefusal as error:
            raise BadExampleError(f"the chat template refuses this conversation: {error}") from error


class _ConversationMasker:
    """Masks one conversation."""

    def __init__(self, masker: ReferenceMasker, conversation: Conversation) -> None:
        self.render, self.profile, self.train_on = masker.render, masker.profile, masker.train_on
        self.backend = masker.backend
        self.conversation = conversation
        self.plain_turns, self.plain_tools = SentinelInserter(self.profile.dialect).conversation(conversation)
        text = self.render(self.plain_turns, self.plain_tools)
        self.block = choose_block(text)
        self.located = self._locate_texts(text)
        self.spans = self.located.spans
        encoding = self.backend.encode(text, add_special_tokens=False)
        self.ids = list(encoding.ids)
        if not self.ids:
            raise BadExampleError("the chat template writes nothing for this conversation")
        self.starts = [start for start, _ in encoding.offsets]

    def _locate_texts(self, text: str) -> LocatedTexts:
        for only_ends in (False, True):
            inserter = SentinelInserter(self.profile.dialect, self.block, only_ends=only_ends)
            self.turns, self.tools = inserter.conversation(self.conversation)
            self.marked_texts = inserter.marked_texts
            try:
                located = locate_texts(self.render(self.turns, self.tools), self.marked_texts, self.block)
            except TemplateRefusal:
                continue
            if located.text == text:
                return located
        raise BadExampleError(
            "the chat template changes the texts of this conversation, so that its turns cannot be found"
        )

    def mask(self) -> MaskedConversation:
        """Find the spans of all texts, end the last turn, and choose the trained tokens."""
        dropped = count_dropped_text(self.conversation, self.located)
        texts: list[tuple[TextSpan, TokenSpan]] = []
        for span in self.spans:
            start, end = self._text_span(span)
            before = texts[-1][1][1] if texts else 0
            texts.append((span, (max(start, before), max(end, before))))
        controls = self.profile.controls
        inside = [(text.marked_text, sum(id in controls for id in self.ids[slice(*span)])) for text, span in texts]
        dropped += count_controls(self.conversation, inside, self.profile.turn_end.text)
        self._check_calls()
        appended = self._append_end()
        trained = [span for span in sorted(self._trained(dropped)) if span[0] < span[1]]
        roles = [
            (self.conversation.messages[text.marked_text.turn].role, span)
            for text, span in texts
            if text.marked_text.turn >= 0
        ]
        return MaskedConversation(self.located.text, self.ids, trained, roles, dropped, appended)

    def _check_calls(self) -> None:
        """Refuse a call that is written twice; only its name may be repeated, and only after the end of its turn.

        Raises:
            BadExampleError: A part of a call is repeated in its own turn, or a part other than the name anywhere.
        """
        for span in self.spans:
            turn = span.marked_text.turn
            if not span.again:
                continue
            names = [call.name.strip() for call in self.conversation.messages[turn].tool_calls] if turn >= 0 else []
            ended = max(self._last_character(turn), span.end)
            stop = self._stop(turn) or self._open_end(turn)
            ended = max(ended, self.starts[stop - 1] if stop else 0)
            if span.marked_text.text not in names or min(span.again) <= ended:
                raise BadExampleError(f"the chat template repeats the tool call of turn {turn + 1}")

    def _append_end(self) -> bool:
        """End a last turn that the template leaves open, so that the model learns to stop."""
        message = self.conversation.messages[-1]
        if message.role != "assistant" or self._stop(len(self.conversation.messages) - 1):
            return False
        turn_end = self.profile.turn_end
        token = turn_end.after_call if message.tool_calls else turn_end.token
        if token is None:
            raise BadExampleError("no end token is known: the tokenizer has no eos token and the template writes none")
        keep = self._token(len(self.located.text.rstrip()))
        self.ids[keep:] = [token]
        self.starts[keep:] = [len(self.located.text)]
        return True

    def _trained(self, dropped: Counter[str]) -> list[TokenSpan]:
        messages = self.conversation.messages
        everything = self.train_on == "all" or self.conversation.unmask
        if not everything:
            return [self._turn(index, dropped) for index in trained_turn_indices(self.conversation, self.train_on)]
        hidden = [self._turn(i, dropped) for i, m in enumerate(messages) if m.train is False and m.role == "assistant"]
        for span in self.spans:
            message = messages[span.marked_text.turn] if span.marked_text.turn >= 0 else None
            untrained = message is not None and message.train is False and message.role != "assistant"
            system = message is not None and message.role in ("system", "developer") and self.train_on != "all"
            if untrained or system:
                hidden.append((self._token(span.start), self._token(span.end)))
        return _without((0 if self.train_on == "all" else self._after_system(), len(self.ids)), hidden)

    def _after_system(self) -> int:
        """The first token after the system text: where the header of the first other turn begins."""
        for span in self.spans:
            turn = span.marked_text.turn
            if turn >= 0 and self.conversation.messages[turn].role not in ("system", "developer"):
                header = self.profile.user_header
                opened = self.located.text.endswith(header, 0, span.start)
                return self._token(span.start - len(header) if opened else span.start)
        return 0

    def _turn(self, index: int, dropped: Counter[str]) -> TokenSpan:
        """The trained tokens of one assistant turn."""
        start, stop = self._first_generated_token(self._start(index)), self._stop(index)
        if stop is None:
            dropped["turns that the template ends with no stop token"] += 1
            stop = self._open_end(index)
        return start, max(start, stop)

    def _token(self, character: int) -> int:
        """The first token that begins at this character or later."""
        return bisect_left(self.starts, character)

    def _first_generated_token(self, character: int) -> int:
        """The first token of a text; a token that begins with the blank before the text belongs to the text."""
        token = self._token(character)
        blank = self.located.text[self.starts[token - 1] : character] if token else ""
        straddles = token == len(self.ids) or self.starts[token] > character
        return token - 1 if straddles and blank and not blank.strip(" ") else token

    def _text_span(self, span: TextSpan) -> TokenSpan:
        """The tokens of a text, for counting: blanks next to it are counted with it, however they are tokenised."""
        start, end = self._first_generated_token(span.start), self._token(span.end)
        while start and self._is_blank(start - 1):
            start -= 1
        while end < len(self.ids) and self._is_blank(end):
            end += 1
        return start, end

    def _is_blank(self, token: int) -> bool:
        next_start = self.starts[token + 1] if token + 1 < len(self.ids) else len(self.located.text)
        text = self.located.text[self.starts[token] : next_start]
        return bool(text) and not text.strip(" ")

    def _own(self, index: int) -> list[TextSpan]:
        return [span for span in self.spans if span.marked_text.turn == index]

    def _next(self, index: int, after: int) -> int:
        """Where the text of a later turn begins."""
        later = (span.start for span in self.spans if span.marked_text.turn > index and span.start >= after)
        return min(later, default=len(self.located.text) + 1)

    def _last_character(self, index: int) -> int:
        own = self._own(index)
        return max(span.end for span in own) if own else self._start(index)

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
        """Where a turn without a stop token ends: after its end marker, else before the next special token."""
        after = self._last_character(index)
        first = self._token(after)
        turn_end = self.profile.turn_end
        if self.conversation.messages[index].tool_calls and turn_end.call_text:
            begins = self.located.text.rfind(turn_end.call_text, after, self._next(index, after))
            if begins >= 0:
                return self._token(begins + len(turn_end.call_text))
        if turn_end.text and self.located.text.startswith(turn_end.text, after):
            return self._token(after + len(turn_end.text))
        limit = self._token(self._next(index, self._last_character(index)))
        special = (token for token in range(first, limit) if self.ids[token] in self.profile.specials)
        return next(special, first)

    def _start(self, index: int) -> int:
        """The character at which the generation prompt ends and the model's own text begins."""
        own = self._own(index)
        limit = min(span.start for span in own) if own else self._next(index, 0)
        previous_tasks = [span for span in self.spans if span.marked_text.turn < index and span.end <= limit]
        previous = max(previous_tasks, key=lambda span: span.end, default=None)
        gap_start = previous.end if previous else 0
        gap = self.located.text[gap_start : min(limit, len(self.located.text))]
        tail = self._prompt_tail(index, previous.marked_text if previous else None)
        begun = find_prompt(self.profile, gap) if tail is None else match_prompt(self.profile, tail, gap)
        if begun is None:
            raise BadExampleError(f"turn {index + 1} does not begin as the template's generation prompt does")
        return gap_start + begun

    def _prompt_tail(self, index: int, previous: MarkedText | None) -> str | None:
        """What the template writes between the last text before a turn and the model's first token."""
        if index == 0:
            return None
        try:
            prompt = self.render(self.turns[:index], self.tools, add_generation_prompt=True)
        except TemplateRefusal:
            return None
        located = locate_texts(prompt, self.marked_texts, self.block)
        last = max(located.spans, key=lambda span: span.end, default=None)
        return located.tail() if (last.marked_text if last else None) is previous else None


def _without(outer: TokenSpan, holes: Sequence[TokenSpan]) -> list[TokenSpan]:
    """A span minus others."""
    kept, position = [], outer[0]
    for start, end in sorted(holes):
        if start > position:
            kept.append((position, start))
        position = max(position, end)
    return [*kept, (position, outer[1])]
