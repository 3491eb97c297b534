"""Chooses the turns of a conversation that are trained."""

from __future__ import annotations

from dataclasses import replace

from lightning_hub.data.conversation import Conversation
from lightning_hub.data.settings import TrainOn


def trained_turn_indices(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """The assistant turns to train on, by index."""
    messages = conversation.messages
    speaking = [index for index, message in enumerate(messages) if message.role == "assistant"]
    first = 0
    if train_on == "last" and speaking:
        first = speaking[-1]
    elif train_on == "completion" or (train_on == "assistant" and conversation.completion_from is not None):
        first = conversation.completion_from or 0
        if conversation.completion_from is None:
            first = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1) + 1
    return [index for index in speaking if (index >= first if messages[index].train is None else messages[index].train)]


def expand(conversation: Conversation) -> list[Conversation]:
    """One conversation per assistant turn that may be trained, each ending with it and training it alone."""
    kept = []
    for index in trained_turn_indices(conversation, "assistant"):
        context = tuple(replace(message, train=False) for message in conversation.messages[:index])
        kept.append(replace(conversation, messages=(*context, conversation.messages[index])))
    return kept or [conversation]
