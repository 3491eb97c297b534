"""Which template is used, what a template may not do, and what a tokenizer must have."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lightning_hub.data.checks import check_positions, check_tokenizer_fits
from lightning_hub.data.conversation import Conversation, Message, Refused
from lightning_hub.data.encode import Encoder
from lightning_hub.data.masking.chat_template import built_in_templates, resolve_template
from lightning_hub.data.settings import DataSettings
from lightning_hub.errors import ConfigError
from tests.data.template_families import make_tokenizer
from tests.data.test_reference import PLAIN, stretches

ENDS = {
    "chatml": ("<s>", "</s>", "{}<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "{}<|eot_id|>"),
    "gemma": ("<bos>", "<eos>", "{}<end_of_turn>"),
    "mistral": ("<s>", "</s>", " {}</s>"),
    "plain": ("<s>", "</s>", "{}</s>"),
}


def test_every_built_in_template_is_covered() -> None:
    assert sorted(ENDS) == built_in_templates()


@pytest.mark.parametrize("name", ENDS)
def test_built_in_templates_give_a_template_to_a_tokenizer_without_one(name: str) -> None:
    bos, eos, form = ENDS[name]
    encoder = Encoder(DataSettings("unused", chat_template=name), make_tokenizer(None, bos, eos))
    (result,) = encoder.encode([Conversation(PLAIN[:2])])
    assert not isinstance(result, Refused)
    assert stretches(encoder, result[0]) == [form.format(PLAIN[1].content)]


def refusal(settings: DataSettings, template: str | None = None, eos: str | None = "<|im_end|>") -> str:
    with pytest.raises(ConfigError) as raised:
        Encoder(settings, make_tokenizer(template, eos=eos)).encode([Conversation(PLAIN)])
    assert raised.value.where
    assert raised.value.remedy
    return str(raised.value)


@pytest.mark.fault("F37")
def test_no_template_is_an_error_with_the_ways_out() -> None:
    assert "a template file or one of the built-in ones (chatml, gemma" in refusal(DataSettings("unused"))


def test_a_template_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}")
    encoder = Encoder(DataSettings("unused", chat_template=str(path)), make_tokenizer("{{ never }}"))
    (result,) = encoder.encode([Conversation(PLAIN[:2])])
    assert not isinstance(result, Refused)
    assert result[0].text.startswith("user: first question<|im_end|>assistant: ")
    assert "neither a file nor a built-in" in refusal(DataSettings("unused", chat_template="chatlm"))
    path.write_bytes(b"\xff")
    assert "cannot be read as a template" in refusal(DataSettings("unused", chat_template=str(path)))
    path.write_text("{% for %}")
    assert "TemplateSyntaxError" in refusal(DataSettings("unused", chat_template=str(path)))


@pytest.mark.fault("F38")
def test_a_built_in_template_needs_its_tokens() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ConfigError, match=r"no <\|im_end\|> <\|im_start\|>, which .* 'chatml' writes"):
        resolve_template("chatml", tokenizer)


def test_a_template_without_texts_is_refused() -> None:
    assert "leaves the texts of the turns out" in refusal(DataSettings("unused"), "nothing at all")


@pytest.mark.security("S15")
@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ raise_exception.__globals__['json'].codecs.open('CANARY', 'w') }}",
        "{% set messages[0]['content'] = open('CANARY', 'w') %}",
    ],
)
def test_a_template_stays_in_its_sandbox(escape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(DataSettings("unused"), escape)
    assert list(tmp_path.iterdir()) == []


def test_a_template_that_raises_on_one_row_refuses_that_row_alone() -> None:
    template = "{% for m in messages %}{{ m.content + (1 // (m.content != 'x')) | string + eos_token }}{% endfor %}"
    encoder = Encoder(DataSettings("unused"), make_tokenizer(template))
    good = Conversation(PLAIN[:2])
    bad = Conversation((Message("user", "x"), Message("assistant", "y")))
    results = encoder.encode([good] * 9 + [bad])
    results += encoder.encode([good, bad, good])
    assert [isinstance(result, Refused) for result in results] == [False] * 9 + [True, False, True, False]


@pytest.mark.fault("F38")
def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    tokenizer = make_tokenizer(None)
    highest = max(tokenizer.get_vocab().values())
    check_tokenizer_fits(tokenizer, highest + 1)
    with pytest.raises(ConfigError, match=rf"reaches id {highest} \('</tool_call>'\).*{highest} rows"):
        check_tokenizer_fits(tokenizer, highest)


@pytest.mark.fault("F38")
def test_lengths_beyond_the_positions_are_refused() -> None:
    config = LlamaConfig(max_position_embeddings=128)
    check_positions(128, config)
    with pytest.raises(ConfigError, match="129 is beyond the 128 positions"):
        check_positions(129, config)
