"""Every layout comes to the same normal form, and what has no shape is refused by name."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hub.data.conversation import BadExampleError, Conversation, Document, Message, Tokens, ToolCall
from lightning_hub.data.readers.formats import normalise, rename
from lightning_hub.data.readers.layouts import Layout, recognise
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
    assert recognise(row, "auto", "file:1").layout == layout
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


TEXTS = {"instruction": "q", "input": "i", "response": "a"}
HISTORY = (Message("user", "q0"), Message("assistant", "a0"))


@pytest.mark.parametrize(
    ("row", "said", "messages"),
    [
        ({"question": "q", "answer": "a"}, "prompt_completion (prompt: question, completion: answer)", PAIR),
        ({"question": "q", "answer": None}, "prompt_completion (prompt: question, completion: answer)", None),
        ({"prompt": "q", "response": "a"}, "prompt_completion (completion: response)", PAIR),
        ({"problem": "q", "solution": "a"}, "prompt_completion (prompt: problem, completion: solution)", PAIR),
        ({"input": "q", "output": "a"}, "prompt_completion (prompt: input, completion: output)", PAIR),
        ({"inputs": "q", "targets": "a"}, "prompt_completion (prompt: inputs, completion: targets)", PAIR),
        ({"user": "q", "assistant": "a"}, "prompt_completion (prompt: user, completion: assistant)", PAIR),
        ({"instruction": "q", "response": "a"}, "alpaca (output: response, input: context)", PAIR),
        ({"instruction": "q", "context": "i", "response": "a"}, "alpaca (output: response, input: context)",
         (Message("user", "q\n\ni"), PAIR[1])),
        (TEXTS, "alpaca (output: response)", (Message("user", "q\n\ni"), PAIR[1])),
        ({"query": "q", "response": "a", "history": [["q0", "a0"]]},
         "alpaca (instruction: query, output: response)", HISTORY + PAIR),
        ({"instruction": "q", "output": "a", "history": json.dumps([["q0", "a0"]])}, "alpaca", HISTORY + PAIR),
        ({"prompt": "q", "completion": None}, "prompt_completion", None),
        ({"messages": None, "prompt": "q", "completion": "a"}, "prompt_completion", PAIR),
        ({"messages": None}, "messages", None),
    ],
)  # fmt: skip
def test_common_pairs_of_columns_are_known(
    row: dict[str, object], said: str, messages: tuple[Message, ...] | None
) -> None:
    recognised = recognise(row, "auto", "file:1")
    assert str(recognised) == said
    if messages is None:
        with pytest.raises(BadExampleError, match="null or missing"):
            normalise(rename(row, recognised.columns), recognised.layout)
        return
    found = normalise(rename(row, recognised.columns), recognised.layout)
    assert isinstance(found, Conversation)
    assert (found.messages, [name for name in found.remarks if "messages" not in name]) == (messages, [])


def remarks(row: dict[str, object], layout: Layout = "messages") -> list[str]:
    return sorted(normalise(row, layout).remarks)


def test_what_is_not_read_is_named() -> None:
    turn = {"role": "assistant", "content": "a"}
    assert remarks({"messages": [turn], "id": 3, "none": None, "empty": ""}) == ["column id is not read"]
    assert remarks({"messages": [turn], "tools": None, "system": "s", "unmask": True}) == []
    assert remarks({"messages": [{**turn, "emotion": "glad", "refusal": None}]}) == [
        "key emotion of a turn is not read"
    ]
    assert remarks({"messages": [{**turn, "value": "b", "from": "gpt"}]}) == [
        "key from of a turn is not read",
        "key value of a turn is not read",
    ]
    thinking = {**turn, "reasoning_content": "hm", "thinking": "hm", "reasoning": "other"}
    assert remarks({"messages": [thinking]}) == ["key reasoning of a turn is not read"]
    part = {"type": "text", "text": "a", "cache_control": {"x": 1}}
    assert remarks({"messages": [{"role": "assistant", "content": [part]}]}) == [
        "key cache_control of a part is not read"
    ]
    assert remarks({"prompt": "q", "completion": "a", "history": [["q", "a"]]}, "prompt_completion") == [
        "column history is not read"
    ]
    assert remarks({"text": "t", "document": "other", "meta": 1}, "document") == [
        "column document is not read",
        "column meta is not read",
    ]
    renamed = rename({"prompt": "x", "question": "q", "completion": "a"}, {"prompt": "question"})
    assert remarks(renamed, "prompt_completion") == ["column prompt (of the input) is not read"]


def test_a_turn_of_a_user_that_asks_to_be_trained_is_named() -> None:
    row: dict[str, object] = {"messages": [{"role": "user", "content": "q", "loss_weight": 1.0}]}
    assert remarks(row) == ["train on a turn that is not the assistant's is not read"]
    assert remarks({**row, "unmask": True}) == []


def test_empty_answers_are_counted() -> None:
    empty = {"role": "assistant", "content": ""}
    assert remarks({"messages": [empty, {"role": "user", "content": ""}, empty]}) == ["empty answers"] * 2
    assert remarks({"messages": [{"role": "assistant", "content": []}]}) == ["empty answers"]
    assert remarks({"prompt": "q", "completion": ""}, "prompt_completion") == ["empty answers"]
    assert remarks({"instruction": "q", "output": ""}, "alpaca") == ["empty answers"]
    assert remarks({"conversations": [{"from": "gpt", "value": ""}]}, "sharegpt") == ["empty answers"]
    assert remarks({"messages": [{**empty, "reasoning_content": "hm"}]}) == []


def test_parts_with_values_are_read() -> None:
    row: dict[str, object] = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
            {
                "role": "assistant",
                "content": [
                    {"type": "reasoning", "value": "hm"},
                    {"type": "text", "value": "a"},
                    {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                ],
                "loss_weight": 1.0,
            },
            {"role": "tool", "content": [{"type": "text", "value": "ok"}], "loss_weight": 0.0},
        ]
    }
    assert normalise(row, "messages") == Conversation(
        (
            Message("user", "q", train=False),
            Message("assistant", "a", reasoning="hm", tool_calls=(CALL,), train=True),
            Message("tool", "ok", train=False),
        )
    )


def test_the_older_name_of_a_call_is_read() -> None:
    call = {"name": "f", "arguments": '{"x": 1}'}
    row: dict[str, object] = {"messages": [{"role": "assistant", "content": None, "function_call": call}]}
    assert normalise(row, "messages") == Conversation((Message("assistant", "", tool_calls=(CALL,)),))


@pytest.mark.parametrize(
    ("call", "expected", "said"),
    [
        ({"name": "f", "parameters": {"x": 1}}, CALL, []),
        ({"name": "f", "arguments": {"x": 1}, "type": "function", "index": 0}, CALL, []),
        ({"id": 7, "function": {"name": "f", "arguments": {"x": 1}}}, ToolCall("f", {"x": 1}, "7"), []),
        ({"name": "f", "input": {"x": 1}}, ToolCall("f", {}), ["key input of a tool call is not read"]),
        (
            {"function": {"name": "f", "arguments": ""}, "result": "r"},
            ToolCall("f", {}),
            ["key result of a tool call is not read"],
        ),
    ],
)
def test_calls_are_read_whole_or_named(call: dict[str, object], expected: ToolCall, said: list[str]) -> None:
    row: dict[str, object] = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert normalise(row, "messages") == Conversation(
        (Message("assistant", "", tool_calls=(expected,)),), remarks=tuple(said)
    )


def test_nulls_of_a_tool_are_kept_as_json_lines_have_them() -> None:
    tool = {"name": "f", "parameters": {"properties": {"x": {"default": None, "enum": [None, 1]}}}}
    found = normalise({"messages": [{"role": "user", "content": "q"}], "tools": [tool]}, "messages")
    assert isinstance(found, Conversation)
    assert found.tools == ({"type": "function", "function": tool},)


def test_columns_give_a_row_our_names() -> None:
    row: dict[str, object] = {"question": "q", "answer": "a", "id": 3}
    renamed = rename(row, {"prompt": "question", "completion": "answer"})
    assert renamed == {"prompt": "q", "completion": "a", "id": 3}
    assert recognise(renamed, "auto", "file:1").layout == "prompt_completion"


def test_an_unknown_layout_lists_its_columns_and_the_ways_out() -> None:
    with pytest.raises(DataError, match=r"file:1: .*columns present: ask, tell; .*data\.init_args\.columns"):
        recognise({"ask": "q", "tell": "a"}, "auto", "file:1")


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
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": 0}]}]},
            "arguments that are not an object",
        ),
        ("messages", {"messages": [{"role": "user", "content": "a"}], "unmask": "yes"}, "unmask must be"),
        ("alpaca", {"instruction": "q"}, "output must be a text, not null or missing"),
        ("prompt_completion", {"prompt": "q", "completion": 3}, "completion must be a list"),
        ("messages", {"messages": [{"role": "assistant"}]}, r"messages\[0\].content is missing"),
        ("messages", {"messages": [{"role": "assistant", "content": None}]}, r"messages\[0\].content is null"),
        ("messages", {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "content is null"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": None}]}, "content is missing"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "content is null"),
        ("messages", {"messages": [{"role": "user", "content": "q", "tool_calls": [{"name": "f"}]}]}, "the role user"),
        ("messages", {"messages": None}, "messages must be a list, not null or missing"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, r"conversations\[0\].value is null"),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, "value is missing"),
        ("alpaca", {"instruction": "q", "output": None}, "output must be a text, not null or missing"),
        ("alpaca", {"instruction": None, "output": "a"}, "instruction must be a text, not null or missing"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, r"history\[0\] must be a question with"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q", None]]}, r"history\[0\] must be a text"),
        ("prompt_completion", {"prompt": "q", "completion": None}, "completion must be .* not null or missing"),
        ("prompt_completion", {"prompt": "q"}, "completion must be .* not null or missing"),
        ("prompt_completion", {"completion": "a", "prompt": None}, "prompt must be .* not null or missing"),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "loss_weight": 0.5}]}, "loss_weight is 0.5"),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "weight": 1, "train": False}]}, "contradicts"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f"}'},
                                                            {"type": "text", "value": "after"}]}]},
            "a text after its tool call",
        ),
        ("document", {"text": "  "}, "the document is empty"),
        ("tokens", {"input_ids": [1, True]}, "whole numbers only"),
        ("tokens", {"input_ids": [1, 2], "labels": [2, -100]}, "labels are not shifted"),
        ("tokens", {"input_ids": [1], "labels": []}, "1 input_ids but 0 labels"),
    ],
)  # fmt: skip
def test_rows_without_shape_are_refused_by_name(layout: Layout, row: dict[str, object], said: str) -> None:
    with pytest.raises(BadExampleError, match=said):
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


@pytest.mark.slow
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
    with suppress(BadExampleError):
        assert isinstance(normalise(row, layout), Conversation | Document | Tokens)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("data.init_args.format", {"format": "xml"}),
        ("data.init_args.train_on", {"train_on": "user"}),
        ("data.init_args.on_long", {"on_long": "cut"}),
        ("data.init_args.max_seq_len", {"max_seq_len": 0}),
        ("data.init_args.num_proc", {"num_proc": 0}),
        ("data.init_args.columns", {"columns": {"question": "prompt"}}),
        ("data.init_args.val", {"val": 1.5}),
        ("data.init_args.train", {"train": []}),
        ("data.init_args.expand_turns", {"expand_turns": True, "train_on": "all"}),
    ],
)
def test_wrong_settings_name_their_key(key: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as raised:
        DataSettings(**{"train": "a.jsonl", **settings})  # type: ignore[arg-type]
    assert raised.value.where == key
    assert raised.value.remedy


def test_a_named_format_is_not_guessed() -> None:
    wanted: Format = "document"
    assert recognise({"messages": []}, wanted, "file:1").layout == "document"
