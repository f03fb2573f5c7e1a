"""The parts of `compare_losses.py`: one run of it, and the table."""
