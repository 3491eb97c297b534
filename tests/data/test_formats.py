"""Every layout comes to the same normal form, and what has no shape is refused by name."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.data.conversation import BadRowError, Conversation, Document, Message, Tokens, ToolCall
from lightning_hub.data.formats import Layout, normalise, recognise, rename
from lightning_hub.data.settings import DataSettings, Format
from lightning_hub.errors import ConfigError, DataError

PAIR = (Message("user", "q"), Message("assistant", "a"))
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = ToolCall("f", {"x": 1}, None)
SYSTEM = Message("system", "s")

ROWS: list[tuple[Layout, dict[str, object], object]] = [
    ("messages", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, PAIR),
    (
        "messages",
        {"messages": json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])},
        PAIR,
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "a"}],
                    "weight": 0,
                },
            ]
        },
        (PAIR[0], Message("assistant", "a", reasoning="hm", train=False)),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "d"},
                {"role": "assistant", "content": None, "reasoning_content": "hm", "train": True,
                 "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
                {"role": "tool", "tool_call_id": "1", "name": "f", "content": "ok"},
            ]
        },
        (
            Message("developer", "d"),
            Message("assistant", "", reasoning="hm", tool_calls=(ToolCall("f", {"x": 1}, "1"),), train=True),
            Message("tool", "ok", name="f", tool_call_id="1"),
        ),
    ),
    (
        "sharegpt",
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "ok"},
                {"from": "gpt", "value": "a"},
            ],
        },
        (SYSTEM, PAIR[0], Message("assistant", "", tool_calls=(CALL,)), Message("tool", "ok"), PAIR[1]),
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, PAIR),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, (Message("user", "q\n\ni"), PAIR[1])),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, PAIR),
    (
        "prompt_completion",
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        PAIR,
    ),
    ("document", {"text": "body"}, Document("body")),
    ("document", {"document": "body"}, Document("body")),
    ("tokens", {"input_ids": [1, 2], "labels": [-100, 2]}, Tokens((1, 2), (-100, 2))),
    ("tokens", {"input_ids": [1, 2]}, Tokens((1, 2), (1, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "row", "expected"), ROWS)
def test_layouts_are_recognised_and_normalised(layout: Layout, row: dict[str, object], expected: object) -> None:
    assert recognise(row, "auto", "file:1") == layout
    found = normalise(row, layout)
    assert (found.messages if isinstance(found, Conversation) else found) == expected


def test_the_completion_is_remembered_and_a_row_can_unmask() -> None:
    found = normalise({"prompt": "q", "completion": "a", "system": "s", "unmask": True}, "prompt_completion")
    assert found == Conversation((SYSTEM, *PAIR), unmask=True, completion_from=2)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), json.dumps([TOOL["function"]])])
def test_tools_are_read_from_lists_and_from_json_text(tools: object) -> None:
    found = normalise({"conversations": [{"from": "human", "value": "q"}], "tools": tools}, "sharegpt")
    assert isinstance(found, Conversation)
    assert found.tools == (TOOL,)


def test_columns_give_a_row_our_names() -> None:
    row: dict[str, object] = {"question": "q", "answer": "a", "id": 3}
    renamed = rename(row, {"prompt": "question", "completion": "answer"})
    assert renamed == {"prompt": "q", "completion": "a", "id": 3}
    assert recognise(renamed, "auto", "file:1") == "prompt_completion"


def test_an_unknown_layout_lists_its_columns_and_the_ways_out() -> None:
    with pytest.raises(DataError, match=r"file:1: .*columns present: answer, question; .*data\.columns"):
        recognise({"question": "q", "answer": "a"}, "auto", "file:1")


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        ("messages", {"messages": []}, "the conversation is empty"),
        ("messages", {"messages": "no json"}, "messages is a text that is not JSON"),
        ("messages", {"messages": [3]}, r"messages\[0\] must be an object"),
        ("messages", {"messages": [{"role": "cat", "content": "miau"}]}, r"messages\[0\] has the role 'cat'"),
        ("messages", {"messages": [{"role": ["user"], "content": "a"}]}, "has the role"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "neither text nor a list"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image'"),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight is 0.5"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "a tool call without a name"),
        ("messages", {"messages": [{"role": "user", "content": "a"}], "unmask": "yes"}, "unmask must be"),
        ("alpaca", {"instruction": "q"}, "output must be a text, not missing"),
        ("prompt_completion", {"prompt": "q", "completion": 3}, "completion must be a list"),
        ("document", {"text": "  "}, "the document is empty"),
        ("tokens", {"input_ids": [1, True]}, "whole numbers only"),
        ("tokens", {"input_ids": [1, 2], "labels": [2, -100]}, "labels are not shifted"),
        ("tokens", {"input_ids": [1], "labels": []}, "1 input_ids but 0 labels"),
    ],
)
def test_rows_without_shape_are_refused_by_name(layout: Layout, row: dict[str, object], said: str) -> None:
    with pytest.raises(BadRowError, match=said):
        normalise(row, layout)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "name", "function", "arguments",
                         "tool_calls", "weight", "train", "id", "reasoning_content"]),
        inner | st.sampled_from(["user", "assistant", "gpt", "function_call", "text", "{}", "[]"]),
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.fault("F34")
@given(
    st.sampled_from(["messages", "sharegpt", "alpaca", "prompt_completion", "document", "tokens"]),
    st.dictionaries(
        st.sampled_from(["messages", "conversations", "prompt", "completion", "instruction", "input", "output",
                         "system", "tools", "text", "document", "input_ids", "labels", "unmask"]),
        JSON | st.lists(JSON, max_size=3),
    ),
)  # fmt: skip
def test_nested_wrong_types_are_refused_never_raised(layout: Layout, row: dict[str, object]) -> None:
    with suppress(BadRowError):
        assert isinstance(normalise(row, layout), Conversation | Document | Tokens)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("data.format", {"format": "xml"}),
        ("data.train_on", {"train_on": "user"}),
        ("data.on_long", {"on_long": "cut"}),
        ("data.max_seq_len", {"max_seq_len": 0}),
        ("data.num_proc", {"num_proc": 0}),
        ("data.columns", {"columns": {"question": "prompt"}}),
        ("data.val", {"val": 1.5}),
        ("data.train", {"train": []}),
        ("data.expand_turns", {"expand_turns": True, "train_on": "all"}),
    ],
)
def test_wrong_settings_name_their_key(key: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as raised:
        DataSettings(**{"train": "a.jsonl", **settings})  # type: ignore[arg-type]
    assert raised.value.where == key
    assert raised.value.remedy


def test_a_named_format_is_not_guessed() -> None:
    wanted: Format = "document"
    assert recognise({"messages": []}, wanted, "file:1") == "document"
