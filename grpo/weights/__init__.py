"""Weights as one flat buffer, and how they travel."""
