"""Weights as one flat host buffer, and how they travel between processes."""
