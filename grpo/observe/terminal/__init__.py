"""The live view in a terminal, and plain lines elsewhere."""
