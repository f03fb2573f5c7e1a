"""What actors and coroutines record of their work, whoever collects it: spans of time and metrics."""
