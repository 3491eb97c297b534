"""LoRA: small adapters beside frozen layers, in the form of the library peft."""

from lightning_hub.methods.lora.module import LoRA

__all__ = ["LoRA"]
