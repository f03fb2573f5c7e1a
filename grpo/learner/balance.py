"""Which rank trains on which groups."""

from __future__ import annotations

from collections.abc import Sequence


def balanced(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Indices into `costs`, in order, for each of `parts`, whose sums are about the same.

    The longest goes first, and each to the part that has least: at most 4/3 of the best there is for the part that has
    most (Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    loads, chosen = [0] * parts, [list[int]() for _ in range(parts)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        chosen[least].append(i)
    return [sorted(part) for part in chosen]
