"""Models with random weights and rows of token ids, both from a seed: the work that contenders share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

SMALLEST = 12
"""The shortest document, in tokens."""


END = "<|endoftext|>"
"""Token 0; Qwen's tokenizers add a token of this name where there is none."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, by the names that transformers gives them."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int = 32768


SHAPES = {
    "tiny": Shape("llama", 32, 64, 2, 2, 2, 320, False),
    "small": Shape("llama", 256, 688, 6, 4, 4, 8192, False),
    "tiny-qwen": Shape("qwen2", 64, 128, 2, 4, 2, 1024, True),
    "0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 151_936, True),
    "1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 151_936, True),
    "7b": Shape("qwen2", 3584, 18_944, 28, 28, 4, 152_064, False),
}
"""``small`` has 9 M parameters; ``0.5b``, ``1.5b`` and ``7b`` are those of Qwen2.5."""


def make_model(folder: Path, shape: Shape, seed: int = 0, device: str = "cpu") -> None:
    """Write random weights in bfloat16 (half the disk; every reader widens them alike) and a tokenizer beside them.

    Each token is a word of its own, as rows come as ids: the tokenizer only has to be as large as the model.
    """
    torch.manual_seed(seed)
    sizes = asdict(shape)
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = [END, *(f"w{number}" for number in range(1, shape.vocab_size))]
    engine = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=END))
    PreTrainedTokenizerFast(tokenizer_object=engine, eos_token=END, pad_token=END).save_pretrained(folder)


def chat_lengths(count: int, mean: float, longest: int, seed: int) -> npt.NDArray[np.int64]:
    """Return lengths as chats have them: log-normal, a few very long ones cut at ``max_document_length``."""
    sigma = 0.9
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn, SMALLEST, longest).astype(np.int64)


def make_rows(path: Path, lengths: npt.NDArray[np.int64], vocabulary: int, seed: int = 0) -> None:
    """Write a document of random ids for each length; the last two thirds of each are trained."""
    source = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for length in lengths.tolist():
            ids = source.integers(3, vocabulary, length).tolist()
            context = max(1, length // 3)
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * context + ids[context:]}) + "\n")
