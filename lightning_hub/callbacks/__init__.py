"""The callbacks of a run: recorder, checkpoint saver, progress bar, run summary, samples, forgetting."""
