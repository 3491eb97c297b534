"""The methods: LightningModules with one shared training step, which differ in the parameters that train."""
