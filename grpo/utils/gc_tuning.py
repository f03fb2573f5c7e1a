"""When Python looks for garbage: rarely while a process starts, for the modules and the model that it loads then stay.

Importing torch and transformers makes objects by the hundred thousand. Looking through them again and again takes a
fifth of that time, and walking all of them blocks an event loop for 0.2 s.
"""

from __future__ import annotations

import gc

_USUAL = gc.get_threshold()


def relax_gc() -> None:
    """Until `restore_gc`."""
    gc.set_threshold(100_000, *_USUAL[1:])


def restore_gc() -> None:
    """From now on, and never again among what is there by now."""
    gc.freeze()
    gc.set_threshold(*_USUAL)
