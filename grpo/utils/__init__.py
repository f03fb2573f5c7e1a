"""Helpers for asyncio, torch and processes, without a word of reinforcement learning."""
