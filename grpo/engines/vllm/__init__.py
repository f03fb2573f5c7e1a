"""Engine on vLLM."""
