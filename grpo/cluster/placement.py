"""Whether the actors of a run have room on the nodes of a cluster: Ray would wait for it for ever."""

# MERGED: Where the ranks of an actor run: together on one node, if one has room for all of them.

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from grpo.actors.specs import ActorSpec
from grpo.errors import LaunchError


@dataclass(frozen=True)
class Node:
    """What one machine has for actors."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


def check_placement(specs: Sequence[ActorSpec], nodes: Sequence[Node], where: str) -> None:
    """Raise LaunchError, naming key and fix, when the actors ask for more than there is, in all or on one node.

    Room for all is looked for as Ray does it, greedily: a process that is too large for what is left of every node
    counts as one without room.
    """
    _check_sum(specs, nodes, where)
    _check_each(specs, nodes, where)
    if unplaced := _without_room(specs, nodes):
        fewer = _fewer(unplaced, specs, nodes)
        key = f"{unplaced.config_group}.{unplaced.counted_by}"
        raise LaunchError(
            f"{unplaced.config_group}.num_{_scarce(unplaced)}: {where} has enough in all, but on its nodes "
            f"({_listed(nodes)}) not every {unplaced.name} finds {_needs(unplaced)} together; "
            + (f"set {key}={fewer}" if fewer else "ask for less in each process")
        )


def nodes_for_all_ranks(gang: ActorSpec, specs: Sequence[ActorSpec], nodes: Sequence[Node]) -> list[int]:
    """Which nodes hold all ranks of an actor such that the others find room in what is left."""
    others = [spec for spec in specs if spec is not gang]
    return [
        i
        for i, node in enumerate(nodes)
        if holds_all_ranks(gang, node) and not _without_room(others, [*nodes[:i], _left(gang, node), *nodes[i + 1 :]])
    ]


def holds_all_ranks(gang: ActorSpec, node: Node) -> bool:
    left = _left(gang, node)
    return left.cpus >= 0 and left.gpus >= 0


def _left(gang: ActorSpec, node: Node) -> Node:
    return Node(node.cpus - gang.ranks * gang.num_cpus, node.gpus - gang.ranks * gang.num_gpus)


def _check_sum(specs: Sequence[ActorSpec], nodes: Sequence[Node], where: str) -> None:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    for resource, key, there in (("GPUs", "num_gpus", gpus), ("CPUs", "num_cpus", cpus)):
        asking = {spec: spec.processes * getattr(spec, key) for spec in specs}
        wanted = sum(asking.values())
        if wanted > there:
            shares = ", ".join(f"{spec.name} {share:g}" for spec, share in asking.items() if share)
            most = max(asking, key=lambda spec: asking[spec])
            group = most.config_group
            if resource == "GPUs" and there == 0:
                zeros = " ".join(f"{spec.config_group}.num_gpus=0" for spec, share in asking.items() if share)
                fix = f"to run without, take +experiment=gsm8k_cpu or set generator.engine=torch {zeros}"
            else:
                fewer = int((there - wanted + asking[most]) / getattr(most, key))
                fix = f"set {group}.{most.counted_by}={fewer}" if fewer > 0 else f"lower {group}.{key}"
            raise LaunchError(
                f"{group}.{key}: the actors ask for {wanted:g} {resource} ({shares}) but {where} has {there:g}; {fix}"
            )


def _check_each(specs: Sequence[ActorSpec], nodes: Sequence[Node], where: str) -> None:
    for spec in specs:
        if not any(spec.num_cpus <= node.cpus and spec.num_gpus <= node.gpus for node in nodes):
            group = spec.config_group
            raise LaunchError(
                f"{group}.num_{_scarce(spec)}: one process needs {_needs(spec)} on one node, and no node of {where} "
                f"has them ({_listed(nodes)}); lower {group}.num_cpus or {group}.num_gpus"
            )


def _without_room(specs: Sequence[ActorSpec], nodes: Sequence[Node]) -> ActorSpec | None:
    """The first actor that finds no room when the largest are placed first, each where the least is left over.

    A fraction of a GPU has to be free on one of them.
    """
    cpus = [node.cpus for node in nodes]
    gpus = [[1.0] * int(node.gpus) for node in nodes]
    for spec in sorted(specs, key=lambda spec: (spec.num_gpus, spec.num_cpus), reverse=True):
        for _ in range(spec.processes):
            devices = {i: _devices(spec, gpus[i]) for i in range(len(nodes)) if spec.num_cpus <= cpus[i]}
            having = {i: found for i, found in devices.items() if found is not None}
            if not having:
                return spec
            chosen = min(having, key=lambda i: (sum(gpus[i]), cpus[i]))
            cpus[chosen] -= spec.num_cpus
            for device in having[chosen]:
                gpus[chosen][device] -= min(1.0, spec.num_gpus)
    return None


def _devices(spec: ActorSpec, free: Sequence[float]) -> list[int] | None:
    """Which GPUs of a node a process would get; None when they are not free. Whole ones, or a share of a single one."""
    count, share = max(1, int(spec.num_gpus)), min(1.0, spec.num_gpus)
    if share == 0:
        return []
    fitting = sorted((i for i in range(len(free)) if free[i] >= share), key=lambda i: free[i])
    return fitting[:count] if len(fitting) >= count else None


def _fewer(unplaced: ActorSpec, specs: Sequence[ActorSpec], nodes: Sequence[Node]) -> int:
    """The most processes of it with which all find room; 0 when that would not help."""
    for count in range(unplaced.processes - 1, 0, -1):
        smaller = replace(unplaced, ranks=count) if unplaced.ranks > 1 else replace(unplaced, replicas=count)
        if not _without_room([smaller if spec is unplaced else spec for spec in specs], nodes):
            return count
    return 0


def _scarce(spec: ActorSpec) -> str:
    return "gpus" if spec.num_gpus else "cpus"


def _needs(spec: ActorSpec) -> str:
    return str(Node(spec.num_cpus, spec.num_gpus)) if spec.num_gpus else f"{spec.num_cpus:g} CPUs"


def _listed(nodes: Sequence[Node]) -> str:
    kinds = {node: nodes.count(node) for node in nodes}
    return ", ".join(f"{count} with {node}" for node, count in kinds.items())


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
