"""Where models come from: any Hugging Face folder or hub name, or a small one made on the spot."""
