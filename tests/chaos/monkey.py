"""Kills processes of a run at random moments."""

import asyncio
import os
import random
import signal
from collections import Counter


class Monkey:
    """SIGKILLs processes of a run on this machine: of every kind in turn, any replica and rank, at moments drawn by the
    seed."""

    def __init__(self, services, failures, *, kinds, kills, seed, pause_s=(0.0, 1.0)):
        self.killed = Counter()
        self._services, self._failures, self._pause_s = services, failures, pause_s
        self._random = random.Random(seed)
        self._plan = [kinds[i % len(kinds)] for i in range(kills)]
        self._random.shuffle(self._plan)

    async def rampage(self, between):
        """Kill by plan; `between()` is awaited after each, so that no budget is spent without need."""
        for kind in self._plan:
            await asyncio.sleep(self._random.uniform(*self._pause_s))
            service = getattr(self._services, kind).service
            await service.available()
            replica = self._random.choice([r for r in service.replicas if r.state == "healthy"])
            os.kill(self._random.choice(replica.endpoint.processes()).pid, signal.SIGKILL)
            self.killed[replica.name] += 1
            await between()
