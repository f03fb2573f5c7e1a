"""Episodes of several turns: thousands at once with actors that only wait, and what turns cost the torch engine."""

from __future__ import annotations

from benchmarks import episode_loop, episode_prefixes
from benchmarks.figures import Figure


def run(quick: bool) -> list[Figure]:
    return [*episode_loop.run(quick), *episode_prefixes.run(quick)]
