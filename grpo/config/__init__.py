"""Every setting with its type, limits and meaning, and how Hydra composes them."""
