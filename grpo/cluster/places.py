"""Where the ranks of an actor run: together on one node, if one has room for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from grpo.cluster.placement import Node, holds_all_ranks, nodes_for_all_ranks
from grpo.cluster.plan import ActorSpec

log = logging.getLogger(__name__)


class Places:
    """Reserved before a run asks for anything else: Ray would spread that over all nodes, and leave ranks some of each.

    A replacement takes what room there is: others are at work by then.
    """

    def __init__(self, patience_s: float = 10.0) -> None:
        self._reserved: dict[str, PlacementGroup] = {}
        self._patience_s = patience_s

    async def reserve(self, specs: Sequence[ActorSpec], nodes: Mapping[str, Node]) -> None:
        """Wait for a place for all ranks of each actor that has several; `nodes` are those of the cluster, by id.

        It is on one node if possible. If others hold that node's room for longer than the patience, or no node is large
        enough, it is on as few as there is room on. Where all ranks on one node would leave another actor without
        room, nothing is reserved.
        """
        for gang in specs:
            if gang.ranks == 1:
                continue
            fitting = nodes_for_all_ranks(gang, specs, list(nodes.values()))
            if fitting and await self._on_one_of(gang, [list(nodes)[i] for i in fitting]):
                continue
            if fitting or not any(holds_all_ranks(gang, node) for node in nodes.values()):
                await self._ready(gang, _asked_for(gang, "PACK"))

    def take(self, gang: ActorSpec) -> PlacementGroup:
        """The one that is reserved, once; later another, which Ray may not have room for yet."""
        return self._reserved.pop(gang.name, None) or _asked_for(gang, "PACK")

    def release(self) -> None:
        """Give back what nobody has taken."""
        for place in self._reserved.values():
            remove_placement_group(place)
        self._reserved.clear()

    async def _on_one_of(self, gang: ActorSpec, ids: Iterable[str]) -> bool:
        place = _asked_for(gang, "STRICT_PACK", {"ray.io/node-id": f"in({','.join(ids)})"})
        try:
            async with asyncio.timeout(self._patience_s):
                await self._ready(gang, place)
        except TimeoutError:
            log.warning("no node has room for all ranks of the %s now: they may run on several", gang.name)
            return False
        return True

    async def _ready(self, gang: ActorSpec, place: PlacementGroup) -> None:
        try:
            await place.ready()
        except BaseException:
            remove_placement_group(place)
            raise
        self._reserved[gang.name] = place


def _asked_for(gang: ActorSpec, strategy: str, labels: Mapping[str, str] | None = None) -> PlacementGroup:
    needs = {"CPU": gang.num_cpus, "GPU": gang.num_gpus}
    bundle = {key: share for key, share in needs.items() if share}
    return placement_group(
        [bundle] * gang.ranks, strategy, bundle_label_selector=labels and [dict(labels)] * gang.ranks
    )
