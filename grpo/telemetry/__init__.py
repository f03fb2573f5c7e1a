"""Spans, metrics and waits that a process records of its own work. Imported by every actor process: must stay light."""
