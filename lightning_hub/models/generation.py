"""Generate answers to prompts: for samples during training, `predict`, `chat` and the demo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

Messages = Sequence[Mapping[str, str]]
"""A conversation that ends with a turn to answer: ``[{"role": ..., "content": ...}, ...]``."""


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Answer prompts, all in one batch.

    Afterwards the mode of the model, its attention implementation and the random state are as before, so generation
    does not change the training.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Conversations to answer.
        max_new_tokens: Maximum length of an answer, in tokens.
        temperature: 0 takes the most likely token each time; above 0 samples.
        streamer: Receives each token when it is generated (one prompt only).

    Returns:
        The answers, without special tokens.
    """
    device = next(model.parameters()).device
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    longest = max(len(ids) for ids in encoded)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[filler] * (longest - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with _generation_mode(model):
        output = model.generate(  # type: ignore[operator]  # typed as a tensor by nn.Module.__getattr__
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
            streamer=streamer,
            **sampling,
        )
    return [text.strip() for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    turns = [dict(message) for message in prompt]
    return cast("list[int]", tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


@contextmanager
def _generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Use PyTorch's attention and eval mode during generation: packed attention has no cache and no padding mask."""
    attention, training = model.config._attn_implementation, model.training
    is_changed = attention not in ("sdpa", "eager")
    sampling = {name: getattr(model.generation_config, name) for name in ("temperature", "top_p", "top_k")}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        if is_changed:
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        try:
            yield
        finally:
            if is_changed:
                model.set_attn_implementation(attention)
            model.train(training)
            for name, value in sampling.items():
                setattr(model.generation_config, name, value)
