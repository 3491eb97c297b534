"""LoRA: small adapters beside frozen layers, in the form of the library peft."""
