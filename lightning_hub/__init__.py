"""Lightning Hub: fine-tune language models from a terminal.

Python code can use the classes that a recipe names, too. Each class is imported at its first use, so ``import
lightning_hub`` does not import torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_hub.callbacks.forgetting import Forgetting
    from lightning_hub.callbacks.generate_samples import GenerateSamples
    from lightning_hub.data.datamodule import ChatData
    from lightning_hub.methods.causal_lm import CausalLMModule
    from lightning_hub.methods.lora import LoRA
    from lightning_hub.methods.osft import OSFT
    from lightning_hub.methods.sft import SFT

__version__ = "0.1.0"

__all__ = ["OSFT", "SFT", "CausalLMModule", "ChatData", "Forgetting", "GenerateSamples", "LoRA", "__version__"]

_MODULES = {
    "OSFT": "lightning_hub.methods.osft",
    "SFT": "lightning_hub.methods.sft",
    "CausalLMModule": "lightning_hub.methods.causal_lm",
    "LoRA": "lightning_hub.methods.lora",
    "ChatData": "lightning_hub.data.datamodule",
    "Forgetting": "lightning_hub.callbacks.forgetting",
    "GenerateSamples": "lightning_hub.callbacks.generate_samples",
}


def __getattr__(name: str) -> object:
    """Import a public class at its first use (PEP 562)."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "LIGHTNING_HUB_SUPERVISOR_PID" in os.environ:  # our supervisor has started this process
    from lightning_hub.parent import die_with_parent

    die_with_parent()  # here, because every import of the package runs this line before torch is imported
