"""What a template does, found once by rendering small conversations with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from lightning_hub.data.conversation import Conversation, Message, ToolCall
from lightning_hub.data.masking.chat_template import Renderer, TemplateRefusal
from lightning_hub.data.masking.sentinels import Marker, Shape, Traced, choose_alphabet, trace
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
            f"{type(tokenizer).__name__} is no fast tokenizer, so that tokens cannot be traced to their text",
            where="model.init_args.model",
            remedy="use a model folder with a tokenizer.json",
        )
    backend.no_padding()
    backend.no_truncation()
    return backend


@dataclass(frozen=True)
class Profile:
    """The habits of one template with one tokenizer.

    Attributes:
        shape: How contents and tool arguments must be given.
        prompt: The generation prompt, "" where the template has none.
        prompt_cuts: Where its tokens end, in characters.
        user_header: What the template writes before a user's text.
        turn_end: What closes a turn of the assistant.
        specials: Every special token.
        controls: Special tokens, and added ones that the template itself writes between texts.
    """

    shape: Shape
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


def probe(render: Renderer, backend: Backend, stop_ids: Iterable[int] = ()) -> Profile:
    """Learn what the template does.

    Args:
        render: The template.
        backend: The tokenizer's engine.
        stop_ids: End-of-text ids of the model's generation config.

    Raises:
        ConfigError: The template cannot render a plain conversation, or leaves its texts out.
    """
    shape, traced = _plain_shape(render)
    eos = render.tokenizer.eos_token_id
    known = frozenset(stop_ids) | (frozenset() if eos is None else {int(eos)})
    specials = special_ids(render.tokenizer)
    prompt, cuts, question_end = _generation_prompt(render, shape, backend)
    gap = _middle(traced, question_end, backend)
    tail = traced.tail().removesuffix(prompt) if prompt else traced.tail()
    last = backend.encode(tail, add_special_tokens=False).ids
    added = specials | frozenset(render.tokenizer.added_tokens_decoder)
    common = gap.ids[: shared(gap.ids, last)]
    stops = known | end_tokens(max(gap.end_ids, common, key=len), last, known, added)
    token = first_of(gap.ids, stops, eos if eos is not None else min(known, default=None))
    arguments = Shape(shape.parts, _arguments_as_text(render, shape))
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
    return Profile(arguments, prompt, cuts, gap.header, end, specials, specials | stops | (added & written))


def _call_end(render: Renderer, shape: Shape, backend: Backend, added: frozenset[int]) -> tuple[list[int], str]:
    """The tokens between a tool call and what the tool says, and the text with which they end the call's turn."""
    try:
        whole = traced_rendering(render, Conversation(_TOOL_TURNS, _TOOLS), shape)
        alone = traced_rendering(render, Conversation(_TOOL_TURNS[:2], _TOOLS), shape)
    except TemplateRefusal:
        return [], ""
    ends = [place.end for place in whole.places if place.segment.turn == 1]
    answers = [place.start for place in whole.places if place.segment.turn == 2]
    if not ends or not answers or max(ends) > min(answers):
        return [], ""
    gap = whole.text[max(ends) : min(answers)]
    text = shared_text(gap, alone.tail()).rstrip()
    closing = backend.encode(text, add_special_tokens=False)
    begin = max(
        (start for token, (start, _) in zip(closing.ids, closing.offsets, strict=True) if token in added), default=0
    )
    return list(backend.encode(gap, add_special_tokens=False).ids), text[begin:]


def traced_rendering(
    render: Renderer, conversation: Conversation, shape: Shape, *, add_generation_prompt: bool = False
) -> Traced:
    """Render a small known conversation with marks, unchecked."""
    marker = Marker(shape, alphabet := choose_alphabet(""))
    turns, tools = marker.conversation(conversation)
    return trace(render(turns, tools, add_generation_prompt=add_generation_prompt), marker.segments, alphabet)


def _plain_shape(render: Renderer) -> tuple[Shape, Traced]:
    refusal = "it leaves the texts of the turns out"
    for turns in (_TURNS, _TURNS[:2]):
        for shape in (Shape(), Shape(parts=True)):
            try:
                traced = traced_rendering(render, Conversation(turns), shape)
            except TemplateRefusal as error:
                refusal = str(error)
                continue
            if not traced.lost():
                return shape, traced
    raise ConfigError(
        f"the chat template cannot render a plain conversation: {refusal}",
        where="data.chat_template",
        remedy="give another template",
    )


@dataclass(frozen=True)
class _Gap:
    """What stands between an answer and the next question: the end of the answer's turn, the header of the question."""

    ids: list[int]
    end_ids: list[int]
    header: str
    text: str = ""


def _middle(traced: Traced, question_end: str, backend: Backend) -> _Gap:
    """Take the gap apart: the end is what also closes a question, else what is not the opening of the first turn."""
    if len(traced.places) < 4:
        return _Gap([], [], "")
    first, answer, second, _ = traced.places
    text = traced.text[answer.end : second.start]
    gap = backend.encode(text, add_special_tokens=False)
    if question_end and text.startswith(question_end):
        border = len(question_end)
    else:
        opening = backend.encode(traced.text[: first.start], add_special_tokens=False).ids
        common = shared(opening[::-1], gap.ids[::-1])
        border = gap.offsets[-common][0] if common else len(text)
    end_ids = [token for token, (start, _) in zip(gap.ids, gap.offsets, strict=True) if start < border]
    return _Gap(gap.ids, end_ids, text[border:], text)


def _generation_prompt(render: Renderer, shape: Shape, backend: Backend) -> tuple[str, tuple[int, ...], str]:
    """The generation prompt, the ends of its tokens, and what closes the question before it.

    The prompt is what follows the tokens that the renderings with and without it share.
    """
    question = Conversation(_TURNS[:1])
    try:
        without = render(*Marker(shape).conversation(question))
        traced = traced_rendering(render, question, shape, add_generation_prompt=True)
    except TemplateRefusal:
        return "", (), ""
    full = backend.encode(traced.text, add_special_tokens=False)
    common = shared(full.ids, backend.encode(without, add_special_tokens=False).ids)
    tail = traced.tail()
    if common == len(full.ids):
        return "", (), tail
    start = full.offsets[common][0]
    prompt = traced.text[start:]
    return prompt, tuple(end - start for _, end in full.offsets[common:]), tail.removesuffix(prompt)


def _arguments_as_text(render: Renderer, shape: Shape) -> bool:
    """Whether tool-call arguments must be given as JSON text: where an object raises or is printed as Python's own."""
    return not _calls_come_out(render, shape, '"city": "Paris"') and _calls_come_out(
        render, Shape(shape.parts, arguments_as_text=True), '"city": "Paris"'
    )


def _calls_come_out(render: Renderer, shape: Shape, spelling: str) -> bool:
    try:
        traced = traced_rendering(render, Conversation(_TOOL_TURNS, _TOOLS), shape)
    except TemplateRefusal:
        return False
    calls = [place for place in traced.places if place.segment.kind == "tool call"]
    printed_by_python = any(traced.text[place.start - 1 : place.start] == "'" for place in calls)
    escaped = any(traced.text[place.start - 2 : place.start] == '\\"' for place in calls)
    return len(calls) == 3 and not printed_by_python and not escaped
