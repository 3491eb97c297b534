"""The methods: LightningModules that share one training step and differ in what is trainable."""
