"""LoRA: small trained adapters beside frozen layers, in the format of the library peft."""

from lightning_hub.methods.lora.module import LoRA

__all__ = ["LoRA"]
