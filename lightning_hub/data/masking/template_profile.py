"""How a template writes turns and their ends, found once by rendering small conversations with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from lightning_hub.data.conversation import Conversation, Message, ToolCall
from lightning_hub.data.masking.chat_template import Renderer, TemplateRefusal
from lightning_hub.data.masking.sentinels import (
    LocatedTexts,
    SentinelInserter,
    TemplateDialect,
    choose_block,
    locate_texts,
)
from lightning_hub.data.masking.turn_end import TurnEnd, end_tokens, first_of, shared, shared_text
from lightning_hub.errors import ConfigError

_TURNS = (
    Message("user", "first question"),
    Message("assistant", "first answer"),
    Message("user", "second question"),
    Message("assistant", "second answer"),
)
_CALL = ToolCall("get_weather", {"city": "Paris"}, "call00001")
_TOOL_TURNS = (
    Message("user", "How is it there?"),
    Message("assistant", "", tool_calls=(_CALL,)),
    Message("tool", "sunny", name="get_weather", tool_call_id="call00001"),
    Message("assistant", "It is sunny."),
)
_TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}},
        },
    },
)


class Encoded(Protocol):
    """What is used of an encoding of the ``tokenizers`` library."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Backend(Protocol):
    """What is used of a tokenizer of the ``tokenizers`` library."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Encoded:
        """Encode one text."""

    def encode_batch_fast(self, input: list[str], *, add_special_tokens: bool) -> list[Encoded]:
        """Encode texts without offsets."""

    def no_padding(self) -> None:
        """Switch padding off."""

    def no_truncation(self) -> None:
        """Switch truncation off."""

    def to_str(self) -> str:
        """The whole tokenizer as JSON."""


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Backend:
    """The fast tokenizer's engine, without padding or truncation.

    Raises:
        ConfigError: The tokenizer is not a fast one.
    """
    backend: Backend | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so the text of each token is not known",
            where="model.init_args.model",
            remedy="use a model folder with a tokenizer.json",
        )
    backend.no_padding()
    backend.no_truncation()
    return backend


@dataclass(frozen=True)
class TemplateProfile:
    """How one template, with one tokenizer, writes conversations.

    Attributes:
        dialect: How contents and tool arguments must be given.
        prompt: The generation prompt, "" where the template has none.
        prompt_cuts: The end of each of its tokens, in characters.
        user_header: The text that the template writes before a user's text.
        turn_end: How a turn of the assistant ends.
        specials: Every special token.
        controls: Special tokens, and added ones that the template itself writes between texts.
    """

    dialect: TemplateDialect
    prompt: str
    prompt_cuts: tuple[int, ...]
    user_header: str
    turn_end: TurnEnd
    specials: frozenset[int]
    controls: frozenset[int]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all tokens that the tokenizer calls special."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | added


def profile_template(render: Renderer, backend: Backend, stop_ids: Iterable[int] = ()) -> TemplateProfile:
    """Find out how the template writes conversations.

    Args:
        render: The template.
        backend: The tokenizer's engine.
        stop_ids: End-of-text ids of the model's generation config.

    Raises:
        ConfigError: The template cannot render a plain conversation, or drops its texts.
    """
    dialect, located = _find_dialect(render)
    eos = render.tokenizer.eos_token_id
    known = frozenset(stop_ids) | (frozenset() if eos is None else {int(eos)})
    specials = special_ids(render.tokenizer)
    prompt, cuts, question_end = _generation_prompt(render, dialect, backend)
    gap = _split_gap(located, question_end, backend)
    tail = located.tail().removesuffix(prompt) if prompt else located.tail()
    last = backend.encode(tail, add_special_tokens=False).ids
    added = specials | frozenset(render.tokenizer.added_tokens_decoder)
    common = gap.ids[: shared(gap.ids, last)]
    stops = known | end_tokens(max(gap.end_ids, common, key=len), last, known, added)
    token = first_of(gap.ids, stops, eos if eos is not None else min(known, default=None))
    arguments = TemplateDialect(dialect.parts, _arguments_as_text(render, dialect))
    call_ids, call_text = _call_end(render, arguments, backend, added)
    written = {index for ids in (gap.ids, last, backend.encode(prompt, add_special_tokens=False).ids) for index in ids}
    end = TurnEnd(
        stops=stops,
        token=token,
        after_call=first_of(call_ids, stops, token),
        text="" if any(index in stops for index in gap.ids) else shared_text(gap.text, tail).rstrip(),
        call_text=call_text,
        appends=not any(index in stops for index in last),
    )
    return TemplateProfile(arguments, prompt, cuts, gap.header, end, specials, specials | stops | (added & written))


def _call_end(
    render: Renderer, dialect: TemplateDialect, backend: Backend, added: frozenset[int]
) -> tuple[list[int], str]:
    """The tokens between a tool call and the tool's answer, and the text among them that ends the call's turn."""
    try:
        whole = located_rendering(render, Conversation(_TOOL_TURNS, _TOOLS), dialect)
        alone = located_rendering(render, Conversation(_TOOL_TURNS[:2], _TOOLS), dialect)
    except TemplateRefusal:
        return [], ""
    ends = [span.end for span in whole.spans if span.marked_text.turn == 1]
    answers = [span.start for span in whole.spans if span.marked_text.turn == 2]
    if not ends or not answers or max(ends) > min(answers):
        return [], ""
    gap = whole.text[max(ends) : min(answers)]
    text = shared_text(gap, alone.tail()).rstrip()
    closing = backend.encode(text, add_special_tokens=False)
    begin = max(
        (start for token, (start, _) in zip(closing.ids, closing.offsets, strict=True) if token in added), default=0
    )
    return list(backend.encode(gap, add_special_tokens=False).ids), text[begin:]


def located_rendering(
    render: Renderer, conversation: Conversation, dialect: TemplateDialect, *, add_generation_prompt: bool = False
) -> LocatedTexts:
    """Render a small known conversation with sentinels, without a comparison with the plain rendering."""
    inserter = SentinelInserter(dialect, block := choose_block(""))
    turns, tools = inserter.conversation(conversation)
    rendered = render(turns, tools, add_generation_prompt=add_generation_prompt)
    return locate_texts(rendered, inserter.marked_texts, block)


def _find_dialect(render: Renderer) -> tuple[TemplateDialect, LocatedTexts]:
    refusal = "it leaves the texts of the turns out"
    for turns in (_TURNS, _TURNS[:2]):
        for dialect in (TemplateDialect(), TemplateDialect(parts=True)):
            try:
                located = located_rendering(render, Conversation(turns), dialect)
            except TemplateRefusal as error:
                refusal = str(error)
                continue
            if not located.missing():
                return dialect, located
    raise ConfigError(
        f"the chat template cannot render a plain conversation: {refusal}",
        where="data.init_args.chat_template",
        remedy="give another template",
    )


@dataclass(frozen=True)
class _TurnGap:
    """The text between an answer and the next question: the end of the answer's turn and the question's header."""

    ids: list[int]
    end_ids: list[int]
    header: str
    text: str = ""


def _split_gap(located: LocatedTexts, question_end: str, backend: Backend) -> _TurnGap:
    """Split the text between an answer and the next question into end-of-turn and header.

    First choice: the end-of-turn is what follows a question. Otherwise: everything that is not the header of the first
    turn.
    """
    if len(located.spans) < 4:
        return _TurnGap([], [], "")
    first, answer, second, _ = located.spans
    text = located.text[answer.end : second.start]
    gap = backend.encode(text, add_special_tokens=False)
    if question_end and text.startswith(question_end):
        border = len(question_end)
    else:
        opening = backend.encode(located.text[: first.start], add_special_tokens=False).ids
        common = shared(opening[::-1], gap.ids[::-1])
        border = gap.offsets[-common][0] if common else len(text)
    end_ids = [token for token, (start, _) in zip(gap.ids, gap.offsets, strict=True) if start < border]
    return _TurnGap(gap.ids, end_ids, text[border:], text)


def _generation_prompt(
    render: Renderer, dialect: TemplateDialect, backend: Backend
) -> tuple[str, tuple[int, ...], str]:
    """The generation prompt, the ends of its tokens (in characters), and the text that ends the question before it.

    The renderings with and without the prompt have their first tokens in common; the prompt is what follows these.
    """
    question = Conversation(_TURNS[:1])
    try:
        without = render(*SentinelInserter(dialect).conversation(question))
        located = located_rendering(render, question, dialect, add_generation_prompt=True)
    except TemplateRefusal:
        return "", (), ""
    full = backend.encode(located.text, add_special_tokens=False)
    common = shared(full.ids, backend.encode(without, add_special_tokens=False).ids)
    tail = located.tail()
    if common == len(full.ids):
        return "", (), tail
    start = full.offsets[common][0]
    prompt = located.text[start:]
    return prompt, tuple(end - start for _, end in full.offsets[common:]), tail.removesuffix(prompt)


def _arguments_as_text(render: Renderer, dialect: TemplateDialect) -> bool:
    """Whether the template needs arguments as JSON text: it raises for an object, or prints it as Python does."""
    return not _calls_come_out(render, dialect, '"city": "Paris"') and _calls_come_out(
        render, TemplateDialect(dialect.parts, arguments_as_text=True), '"city": "Paris"'
    )


def _calls_come_out(render: Renderer, dialect: TemplateDialect, spelling: str) -> bool:
    try:
        located = located_rendering(render, Conversation(_TOOL_TURNS, _TOOLS), dialect)
    except TemplateRefusal:
        return False
    calls = [span for span in located.spans if span.marked_text.kind == "tool call"]
    printed_by_python = any(located.text[span.start - 1 : span.start] == "'" for span in calls)
    escaped = any(located.text[span.start - 2 : span.start] == '\\"' for span in calls)
    return len(calls) == 3 and not printed_by_python and not escaped
