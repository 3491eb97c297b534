"""A conversation with a model in the terminal."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TextStreamer

from lightning_hub.models.generation import complete
from lightning_hub.models.pretrained import Pretrained


class Chat:
    """Keeps a conversation and prints answers token by token.

    Args:
        source: A model folder or hub id.
        system: A system message before the conversation.
        trust_remote_code: Whether Python files of the model may run.
    """

    def __init__(self, source: str, system: str | None = None, trust_remote_code: bool = False) -> None:
        pretrained = Pretrained(source, trust_remote_code)
        on_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.model = pretrained.load(dtype=dtype, attn_implementation="sdpa")
        nn.Module.to(self.model, "cuda" if on_gpu else "cpu")
        self.model.eval()
        self.tokenizer = pretrained.tokenizer
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def reply(self, text: str, *, max_new_tokens: int, temperature: float) -> str:
        """Answer a message: print the tokens one by one, and add both turns to the conversation.

        Args:
            text: The message of the user.
            max_new_tokens: Maximum length of the answer, in tokens.
            temperature: 0 takes the most likely token each time.
        """
        self.messages.append({"role": "user", "content": text})
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        reply = complete(
            self.model,
            self.tokenizer,
            [self.messages],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            streamer=streamer,
        )[0]
        self.messages.append({"role": "assistant", "content": reply})
        return reply
