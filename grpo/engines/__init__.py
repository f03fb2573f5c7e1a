"""Engines that turn prompts into completions. The generator knows them by the `Engine` protocol alone."""
