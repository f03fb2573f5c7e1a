"""Tuning of Python's garbage collector: rare collections while a process starts.

Importing torch and transformers makes objects by the hundred thousand, and most of them stay. Scanning them again and
again takes a fifth of the start, and one full scan blocks an event loop for 0.2 s.
"""

from __future__ import annotations

import gc

_DEFAULT = gc.get_threshold()


def relax_gc() -> None:
    """Collect rarely until `restore_gc`."""
    gc.set_threshold(100_000, *_DEFAULT[1:])


def restore_gc() -> None:
    """Collect at the default rate again, and never scan the objects that exist now."""
    gc.freeze()
    gc.set_threshold(*_DEFAULT)
