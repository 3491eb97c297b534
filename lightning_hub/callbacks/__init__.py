"""What watches and keeps a run: the recorder, checkpoints, the progress bar, samples."""
