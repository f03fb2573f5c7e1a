"""Display of a run in the terminal: a live view, or plain lines for pipes."""
