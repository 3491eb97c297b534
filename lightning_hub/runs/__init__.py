"""The run folder: names, writers, readers and verdicts, with the standard library only."""
