"""Checks that a tokenizer and the sample lengths fit a model, before a device fails with a less clear error."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightning_hub.errors import ConfigError


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer that gives ids which the embedding does not have.

    Args:
        tokenizer: Its highest id counts, not its number of tokens.
        vocab_size: Rows of the embedding; more rows than tokens is usual and fine.

    Raises:
        ConfigError: Names the highest token.
    """
    vocabulary = tokenizer.get_vocab()
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise ConfigError(
            f"the tokenizer reaches id {highest} ({token!r}), the model's embedding has {vocab_size} rows",
            where="model.init_args.model",
            remedy="use the tokenizer that belongs to the model, or resize the embedding and save the model first",
        )


def check_positions(max_seq_len: int, config: PretrainedConfig) -> None:
    """Refuse samples longer than the positions that a model knows.

    Raises:
        ConfigError: Names both numbers.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_seq_len > positions:
        raise ConfigError(
            f"{max_seq_len} is beyond the {positions} positions of the model",
            where="data.init_args.max_seq_len",
            remedy=f"give {positions} or less, or set rope scaling in the model's config",
        )
