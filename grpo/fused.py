"""Many small operations on a GPU as one kernel, where torch can compile them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose first argument is a tensor, compiled for tensors on a GPU and itself for all others.

    Where compiling fails, for want of a C compiler say, it goes on as it is, and says so once.
    """
    compiled: Callable[P, R] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled
        tensor = args[0]
        if not (isinstance(tensor, torch.Tensor) and tensor.is_cuda):
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function, dynamic=True)
            try:
                return compiled(*args, **kwargs)
            except Exception as error:  # whatever a compiler may raise; it raises before anything has run
                log.warning("%s is not compiled: %s: %s", function.__name__, type(error).__name__, error)
                compiled = function
        return compiled(*args, **kwargs)

    return call
