"""Random conversations through every family: what the others said is never trained, what the model said always is."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_hub.data.conversation import Conversation, Message, Refused, Role, ToolCall
from lightning_hub.data.encode import Encoder
from lightning_hub.data.masking.sentinels import SentinelInserter
from lightning_hub.data.settings import DataSettings
from tests.data.template_families import FAMILIES
from tests.data.test_reference import stretches

ENCODERS = {}
for family in FAMILIES:
    tokenizer = family.tokenizer()
    ENCODERS[f"{family.name}-{family.eos}"] = Encoder(DataSettings("unused"), tokenizer, family.stop_ids(tokenizer))

SPICE = st.sampled_from(
    ["", " ", "\n", "\n\n  ", "'", '"', "{", "\\", "ä", "漢", "\U0001f600", "\U00020000", "|", "<", "[", "assistant\n"]
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Turns in any order, each with a word that no other has."""
    messages: list[Message] = []
    roles: list[Role] = ["user", "assistant", "assistant", "user", "system", "tool"]
    for number in range(draw(st.integers(1, 6))):
        orderly: Role = "assistant" if number % 2 else "user"
        role = draw(st.just(orderly) | st.just(orderly) | st.sampled_from(roles))
        content = f"{draw(SPICE)}{role[0]}q{number}z{draw(SPICE)}"
        speaking = role == "assistant"
        calls: tuple[ToolCall, ...] = ()
        if speaking and draw(st.integers(0, 5)) == 0:
            calls = (ToolCall(f"aq{number}call", {"k": [f"aq{number}v{draw(SPICE)}", 1, None]}, "call00001"),)
            content = draw(st.sampled_from(["", content]))
        thoughts = f"aq{number}t{draw(SPICE)}" if speaking and draw(st.integers(0, 4)) == 0 else ""
        if thoughts and draw(st.booleans()):
            content, thoughts = f"<think>\n{thoughts}\n</think>\n\n{content}", ""
        messages.append(Message(role, content, thoughts, calls, tool_call_id="call00001" if role == "tool" else None))
    return Conversation(tuple(messages))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=40, deadline=None)
@given(conversations())
def test_trained_is_what_the_model_said(name: str, conversation: Conversation) -> None:
    encoder = ENCODERS[name]
    (result,) = encoder.encode([conversation])
    assume(not isinstance(result, Refused))
    assert not isinstance(result, Refused)
    (sample,) = result
    trained = "\x00".join(stretches(encoder, sample))
    for number, message in enumerate(conversation.messages):
        word = f"{message.role[0]}q{number}z"
        if message.role != "assistant":
            assert word not in trained
        elif word in message.content and "texts beside tool calls dropped" not in sample.notes:
            assert trained.count(word) == 1
        if message.tool_calls:
            assert trained.count(f"aq{number}call") == trained.count(f"aq{number}v") == 1
    turns, tools = SentinelInserter(encoder.reference_masker.profile.dialect).conversation(conversation)
    engine = cast(Callable[..., list[int]], encoder.tokenizer.apply_chat_template)
    expected = engine(turns, tools=tools, tokenize=True, return_dict=False)
    kept = len(sample.ids) - sample.notes.get("end tokens appended", 0)
    assert sample.ids[:kept].tolist() == expected[:kept]
