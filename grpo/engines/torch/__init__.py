"""Engine on plain PyTorch and transformers."""
