"""Observation of a run: metrics, the run's folder, the timeline, sinks and the terminal."""
