"""The engine on plain PyTorch and transformers."""
