"""Checkpoints of a run: the folders and their manifest, the trainer's state, buffered groups, and resuming."""
