"""Files to examples, samples, packed rows and optimizer steps."""
