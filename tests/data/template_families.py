"""Template families for tests, with the tokens that belong to each, and one small tokenizer that knows them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "user assistant system model tool Human Machine final analysis commentary",
    "first question second answer: it is sunny in Paris today\n\n",
] * 4
SPECIALS = (
    "<|endoftext|> <s> </s> <|im_start|> <|im_end|> <|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|>"
    " [INST] [/INST] <bos> <eos> <start_of_turn> <end_of_turn> <|begin▁of▁sentence|> <|end▁of▁sentence|> <|User|>"
    " <|Assistant|> <|tool▁call|> <|tool▁output|> [gMASK] <sop> <|user|> <|assistant|> <|system|> <|observation|>"
    " <|start|> <|end|> <|message|> <|channel|> <|return|> <|call|> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|>"
    " <|CHATBOT_TOKEN|> <|USER_TOKEN|> <|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>"
)


@cache
def _engine() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS.split(), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return str(tokenizer.to_str())


def make_tokenizer(
    template: str | None,
    bos: str | None = None,
    eos: str | None = "<|im_end|>",
    special: Sequence[str] = (),
    added: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with pad = eos and a template's source.

    Args:
        template: The source.
        bos: The first token of a text.
        eos: The end of a text.
        special: More special tokens.
        added: More tokens that are not special.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_engine()), bos_token=bos, eos_token=eos, pad_token=eos
    )
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Family:
    """One family: its template's name, its tokens, and what a plain answer becomes.

    Attributes:
        middle, last: What is trained of an answer that is followed by others, and of the last one; ``{}`` is its text.
        stops: Extra end tokens of the generation config.
        special, added: Tokens that the tokenizer has beside the common ones.
    """

    name: str
    eos: str
    middle: str
    last: str
    bos: str | None = None
    stops: Sequence[str] = ()
    system: bool = True
    special: Sequence[str] = ()
    added: Sequence[str] = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        source = (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")
        return make_tokenizer(source, self.bos, self.eos, self.special, self.added)

    def stop_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        vocabulary = tokenizer.get_vocab()
        return [vocabulary[stop] for stop in self.stops]


def _same(name: str, eos: str, both: str, bos: str | None = None, system: bool = True) -> Family:
    return Family(name, eos, both, both, bos, system=system)


GLM_TOKENS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<tool_response>", "</tool_response>")
GEMMA_TOKENS = ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')

FAMILIES = (
    _same("chatml", "<|im_end|>", "{}<|im_end|>"),
    Family("chatml", "<|endoftext|>", "{}<|im_end|>", "{}<|im_end|>"),
    _same("llama3", "<|eot_id|>", "{}<|eot_id|>", "<|begin_of_text|>"),
    _same("mistral", "</s>", " {}</s>", "<s>"),
    _same("llama2", "</s>", " {} </s>", "<s>"),
    _same("gemma", "<eos>", "{}<end_of_turn>", "<bos>", system=False),
    _same("gemma3", "<eos>", "{}<end_of_turn>", "<bos>"),
    Family("qwen3", "<|im_end|>", "{}<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>"),
    _same("deepseek", "<|end▁of▁sentence|>", "{}<|end▁of▁sentence|>", "<|begin▁of▁sentence|>"),
    Family("glm4", "<|endoftext|>", "{}<|user|>", "{}<|user|>", stops=("<|endoftext|>", "<|user|>", "<|observation|>")),
    Family("gptoss", "<|return|>", "<|channel|>final<|message|>{}<|end|>", "<|channel|>final<|message|>{}<|return|>",
           stops=("<|return|>", "<|call|>")),
    _same("phi3", "<|endoftext|>", "{}<|end|>"),
    _same("nemotron", "<|im_end|>", "</think>{}<|im_end|>"),
    _same("cohere2", "<|END_OF_TURN_TOKEN|>", "{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<bos>"),
    _same("indented", "</s>", "        {}</s>"),
    _same("parts", "<|im_end|>", "{}<|im_end|>"),
    Family("bare", "</s>", " {}", " {}</s>"),
    Family("idefics", "</s>", " {}<end_of_utterance>", " {}<end_of_utterance>", special=["<end_of_utterance>"]),
    Family("idefics", "<eos>", " {}<end_of_utterance>", " {}<end_of_utterance>", added=["<end_of_utterance>"]),
    Family("idefics", "<s>", " {}<end_of_utterance>", " {}<end_of_utterance><s>"),
    Family("command", "</s>", "<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
           "<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<bos>"),
    Family("glm45", "<|endoftext|>", "\n<think></think>\n{}<|user|>", "\n<think></think>\n{}<|user|>",
           stops=("<|endoftext|>", "<|user|>", "<|observation|>"), added=GLM_TOKENS),
    Family("gemma4", "<eos>", "{}<turn|>", "{}<turn|>", "<bos>", stops=("<eos>", "<turn|>", "<|tool_response>"),
           special=GEMMA_TOKENS),
    Family("gemma4", "</s>", "{}<turn|>", "{}<turn|>", "<bos>", special=GEMMA_TOKENS),
)  # fmt: skip
