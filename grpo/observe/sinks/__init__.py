"""Sinks: destinations of a run's metrics outside of its folder."""
