"""Everything a run leaves on disk to go on from: trainer state, replay buffer, resume."""
