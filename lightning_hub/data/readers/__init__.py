"""Files, folders and datasets to examples in one form, each with its place."""
