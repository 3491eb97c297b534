"""Open a pretrained model: its configuration, tokenizer and weights. Every fault is reported as one message."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from lightning_hub.errors import ConfigError
from lightning_hub.runs.folder import EMBEDDED_MODEL

_T = TypeVar("_T")

transformers_logging.disable_progress_bar()  # it would draw a bar for each read, over our own bar

EMBEDDED_FOLDER = Path(__file__).with_name("embedded")

ROOM_FOLDER = Path(__file__).with_name("embedded_room")
"""A second embedded model, for ``lightning-hub demo --method``: its weights have directions that it does not use."""

ADAPTER_CONFIG = "adapter_config.json"
"""A folder with this file is an adapter."""

MODEL_OPTION = "model.init_args.model"
"""The recipe key of the model, for error messages."""


@dataclass(frozen=True)
class Pretrained:
    """A pretrained causal language model. It is opened in steps, so that cheap checks come first.

    Args:
        source: A local folder, a hub id, or ``demo`` for the model that is part of the package.
        trust_remote_code: Whether Python files of the model may run. Only a command-line flag sets it.
    """

    source: str
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        looks_local = self.source.startswith((".", "/", "~")) or self.source.count("/") > 1
        if self.source.startswith(("http://", "https://")):
            raise ConfigError(f"{self.source} is a URL", where=MODEL_OPTION, remedy="give a hub id or a local folder")
        if looks_local and not self.path.is_dir():
            raise ConfigError(
                f"no such folder: {self.source}", where=MODEL_OPTION, remedy="give a local folder or a hub id"
            )
        if self.path.is_dir() and not (self.path / "config.json").is_file() and self.base is None:
            remedy = "give a folder that AutoModelForCausalLM can load"
            raise ConfigError(f"{self.source} has no config.json", where=MODEL_OPTION, remedy=remedy)

    @property
    def path(self) -> Path:
        """The source as a local path; for a hub id this path may not exist."""
        path = Path(self.source).expanduser()
        return EMBEDDED_FOLDER if self.source == EMBEDDED_MODEL and not path.is_dir() else path

    @cached_property
    def base(self) -> Pretrained | None:
        """The model that the source is an adapter for; None if it is a model itself."""
        file = self.path / ADAPTER_CONFIG
        if not file.is_file() or (self.path / "config.json").is_file():
            return None
        try:
            return Pretrained(json.loads(file.read_bytes())["base_model_name_or_path"], self.trust_remote_code)
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{file} names no base model", where=MODEL_OPTION, remedy="give a model folder"
            ) from error

    @property
    def name(self) -> str:
        """The name for ``from_pretrained``: a local path or a hub id."""
        return str(self.path) if self.path.is_dir() else self.source

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration; weights are not read."""
        if self.base is not None:
            return self.base.config
        config: PretrainedConfig = self._open("configuration", AutoConfig.from_pretrained)
        remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (remote and self.trust_remote_code):
            message = f"{self.source} is of type {config.model_type!r}, which is not a causal language model"
            remedy = "pass --trust-remote-code if you trust its code" if remote else "give a causal language model"
            raise ConfigError(message, where=MODEL_OPTION, remedy=remedy)
        return config

    def check_part(self, opened: PretrainedConfig) -> None:
        """Refuse a model of which only a part would be trained, if that part cannot be loaded again alone.

        Args:
            opened: The configuration of the part that transformers opens.

        Raises:
            ConfigError: AutoModelForCausalLM could not load the trained part.
        """
        if opened.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(opened, "auto_map", None):
            return
        raise ConfigError(
            f"{self.source} has the type {self.config.model_type!r}; transformers opens only its part of type "
            f"{opened.model_type!r}, which AutoModelForCausalLM cannot open after training",
            where=MODEL_OPTION,
            remedy="give a model that is a complete causal language model",
        )

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of its weights on disk; float32 if its configuration has none."""
        found = self.config.dtype
        return found if isinstance(found, torch.dtype) else torch.float32

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's own tokenizer."""
        tokenizer = self._open("tokenizer", AutoTokenizer.from_pretrained)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            remedy = "add a tokenizer.json to it"
            raise ConfigError(f"{self.source} has no fast tokenizer", where=MODEL_OPTION, remedy=remedy)
        return tokenizer

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The generation config of the model; made from its configuration if it has no ``generation_config.json``."""
        if self.base is not None:
            return self.base.generation_config
        try:
            return GenerationConfig.from_pretrained(self.name)
        except OSError:
            return GenerationConfig.from_model_config(self.config)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids at which generation stops: those of the generation config, and the eos token of the tokenizer."""
        found = self.generation_config.eos_token_id
        ids = [found] if isinstance(found, int) else list(found or [])
        if self.tokenizer.eos_token_id is not None:
            ids.append(int(self.tokenizer.eos_token_id))
        return tuple(dict.fromkeys(ids))

    def load(
        self,
        *,
        dtype: torch.dtype,
        attn_implementation: str,
        quantization_config: BitsAndBytesConfig | None = None,
        device: torch.device | None = None,
    ) -> PreTrainedModel:
        """Read the weights. An adapter is merged into its base model in float32; then the weights are cast.

        Args:
            dtype: The dtype of the weights in memory.
            attn_implementation: A name that transformers knows; our own names are registered there.
            quantization_config: How linear layers are quantized; not for an adapter.
            device: The device of quantized layers.
        """
        if self.base is not None:
            return self._merged(self.base.load(dtype=torch.float32, attn_implementation=attn_implementation), dtype)
        given = {"config": self.config, "dtype": dtype, "attn_implementation": attn_implementation}
        if quantization_config is not None:
            given |= {"quantization_config": quantization_config, "device_map": {"": device}}
        model: PreTrainedModel = self._open(
            "weights", lambda name, **options: AutoModelForCausalLM.from_pretrained(name, **given, **options)
        )
        model.generation_config = self.generation_config
        return model

    def _merged(self, base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        from peft import PeftModel  # half a second, for adapters only

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated.*")  # peft asks by this name
            adapted = self._open("adapter", lambda name, **_: PeftModel.from_pretrained(base, name))
        model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    def skeleton(self, *, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
        """Build the model without its weights, on the default device; on ``meta`` it uses no memory."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            self.config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        model.generation_config = self.generation_config
        return model

    def _open(self, what: str, reader: Callable[..., _T]) -> _T:
        """Call a reader of transformers and turn its failure into one message."""
        try:
            return reader(self.name, trust_remote_code=self.trust_remote_code)
        except (pickle.UnpicklingError, EOFError) as error:  # pytorch_model.bin, of which torch reads tensors alone
            raise ConfigError(
                f"cannot read the {what} of {self.source} (its pickle file is damaged, or would run code)",
                where=MODEL_OPTION,
                remedy="save the model as safetensors on the machine that it comes from",
            ) from error
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            remedy = "check the folder or hub id, and that this machine can reach the hub"
            if "trust_remote_code" in reason:
                reason, remedy = "it runs its own code", "pass --trust-remote-code if you trust that code"
            raise ConfigError(
                f"cannot read the {what} of {self.source} ({reason[:300]})", where=MODEL_OPTION, remedy=remedy
            ) from error
