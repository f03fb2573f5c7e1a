"""Models and tokenizers: any Hugging Face folder or hub name, or a small model built on the spot."""
