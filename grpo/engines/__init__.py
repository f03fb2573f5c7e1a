"""Engines turn prompts into completions. The `Engine` protocol is all that the generator knows of them."""
