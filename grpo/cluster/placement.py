"""Check that the actors of a run fit on the nodes of a cluster, and reserve room for actors of several ranks.

Ray has no such check: an actor that fits on no node stays pending, without an error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from grpo.actors.specs import ActorSpec
from grpo.errors import LaunchError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one node that actors can use."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


def check_placement(specs: Sequence[ActorSpec], nodes: Sequence[Node], cluster: str) -> None:
    """Raise LaunchError, naming key and fix, when the actors ask for more than there is in all or on one node.

    The processes are placed greedily, as Ray does: a process that is too large for the rest of every node has no room.
    `cluster` names the cluster in the message.
    """
    _check_sum(specs, nodes, cluster)
    _check_largest(specs, nodes, cluster)
    if unplaced := _first_unplaced(specs, nodes):
        fitting = _largest_fitting_count(unplaced, specs, nodes)
        key = f"{unplaced.config_group}.{unplaced.counted_by}"
        raise LaunchError(
            f"{unplaced.config_group}.num_{_scarce(unplaced)}: {cluster} has enough in all, but on its nodes "
            f"({_listed(nodes)}) not every {unplaced.name} finds {_needs(unplaced)} together; "
            + (f"set {key}={fitting}" if fitting else "ask for less in each process")
        )


def _check_sum(specs: Sequence[ActorSpec], nodes: Sequence[Node], cluster: str) -> None:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    for resource, key, available in (("GPUs", "num_gpus", gpus), ("CPUs", "num_cpus", cpus)):
        asked = {spec: spec.processes * getattr(spec, key) for spec in specs}
        total = sum(asked.values())
        if total <= available:
            continue
        # The fix is fewer processes of the actor that asks for most, or for GPUs a setting that needs none.
        most = max(asked, key=lambda spec: asked[spec])
        group = most.config_group
        if resource == "GPUs" and available == 0:
            zeros = " ".join(f"{spec.config_group}.num_gpus=0" for spec, amount in asked.items() if amount)
            fix = f"to run without, take +experiment=gsm8k_cpu or set generator.engine=torch {zeros}"
        else:
            fitting = int((available - total + asked[most]) / getattr(most, key))
            fix = f"set {group}.{most.counted_by}={fitting}" if fitting > 0 else f"lower {group}.{key}"
        amounts = ", ".join(f"{spec.name} {amount:g}" for spec, amount in asked.items() if amount)
        raise LaunchError(
            f"{group}.{key}: the actors ask for {total:g} {resource} ({amounts}) but {cluster} has {available:g}; {fix}"
        )


def _check_largest(specs: Sequence[ActorSpec], nodes: Sequence[Node], cluster: str) -> None:
    for spec in specs:
        if not any(spec.num_cpus <= node.cpus and spec.num_gpus <= node.gpus for node in nodes):
            group = spec.config_group
            raise LaunchError(
                f"{group}.num_{_scarce(spec)}: one process needs {_needs(spec)} on one node, and no node of {cluster} "
                f"has them ({_listed(nodes)}); lower {group}.num_cpus or {group}.num_gpus"
            )


def _first_unplaced(specs: Sequence[ActorSpec], nodes: Sequence[Node]) -> ActorSpec | None:
    """Place the largest processes first, each on the fullest node that holds it; return the first without room.

    A fraction of a GPU has to be free on a single GPU.
    """
    cpus = [node.cpus for node in nodes]
    gpus = [[1.0] * int(node.gpus) for node in nodes]
    for spec in sorted(specs, key=lambda spec: (spec.num_gpus, spec.num_cpus), reverse=True):
        for _ in range(spec.processes):
            devices = {i: _free_devices(spec, gpus[i]) for i in range(len(nodes)) if spec.num_cpus <= cpus[i]}
            fitting = {i: chosen for i, chosen in devices.items() if chosen is not None}
            if not fitting:
                return spec
            fullest = min(fitting, key=lambda i: (sum(gpus[i]), cpus[i]))
            cpus[fullest] -= spec.num_cpus
            for device in fitting[fullest]:
                gpus[fullest][device] -= min(1.0, spec.num_gpus)
    return None


def _free_devices(spec: ActorSpec, free: Sequence[float]) -> list[int] | None:
    """Return the GPUs of a node that a process would get: whole GPUs, or a share of one. None if they are not free."""
    count, share = max(1, int(spec.num_gpus)), min(1.0, spec.num_gpus)
    if share == 0:
        return []
    fitting = sorted((i for i in range(len(free)) if free[i] >= share), key=lambda i: free[i])
    return fitting[:count] if len(fitting) >= count else None


def _largest_fitting_count(unplaced: ActorSpec, specs: Sequence[ActorSpec], nodes: Sequence[Node]) -> int:
    """Return the most processes of the actor with which every actor has room; 0 when fewer would not help."""
    for count in range(unplaced.processes - 1, 0, -1):
        smaller = replace(unplaced, ranks=count) if unplaced.ranks > 1 else replace(unplaced, replicas=count)
        if not _first_unplaced([smaller if spec is unplaced else spec for spec in specs], nodes):
            return count
    return 0


def _scarce(spec: ActorSpec) -> str:
    return "gpus" if spec.num_gpus else "cpus"


def _needs(spec: ActorSpec) -> str:
    return str(Node(spec.num_cpus, spec.num_gpus)) if spec.num_gpus else f"{spec.num_cpus:g} CPUs"


def _listed(nodes: Sequence[Node]) -> str:
    kinds = {node: nodes.count(node) for node in nodes}
    return ", ".join(f"{count} with {node}" for node, count in kinds.items())


class RankGroups:
    """Placement groups for actors of several ranks, reserved before a run starts any other process.

    Ray would spread the other processes over all nodes, and leave room for a few ranks on each of them. A replacement
    takes the room that is left: the rest of the run is at work by then.
    """

    def __init__(self, patience_s: float = 10.0) -> None:
        self._reserved: dict[str, PlacementGroup] = {}
        self._patience_s = patience_s

    async def reserve(self, specs: Sequence[ActorSpec], nodes: Mapping[str, Node]) -> None:
        """Wait for room for all ranks of every actor that has several; `nodes` are the nodes of the cluster, by id.

        The ranks are on one node if possible. If that node's room is in use for longer than `patience_s`, or no node is
        large enough, they are on as few nodes as there is room on. If all ranks on one node would leave another actor
        without room, nothing is reserved.
        """
        for spec in specs:
            if spec.ranks == 1:
                continue
            fitting = nodes_for_all_ranks(spec, specs, list(nodes.values()))
            if fitting and await self._reserve_on_one_of(spec, [list(nodes)[i] for i in fitting]):
                continue
            if fitting or not any(_holds_all_ranks(spec, node) for node in nodes.values()):
                await self._wait_ready(spec, _request_group(spec, "PACK"))

    def pop(self, spec: ActorSpec) -> PlacementGroup:
        """Return the group that is reserved for the actor, once; later a new one, which may have to wait for room."""
        return self._reserved.pop(spec.name, None) or _request_group(spec, "PACK")

    def release(self) -> None:
        """Give back the groups that were not used."""
        for group in self._reserved.values():
            remove_placement_group(group)
        self._reserved.clear()

    async def _reserve_on_one_of(self, spec: ActorSpec, node_ids: Iterable[str]) -> bool:
        group = _request_group(spec, "STRICT_PACK", {"ray.io/node-id": f"in({','.join(node_ids)})"})
        try:
            async with asyncio.timeout(self._patience_s):
                await self._wait_ready(spec, group)
        except TimeoutError:
            log.warning("no node has room for all ranks of the %s now; they may run on several nodes", spec.name)
            return False
        return True

    async def _wait_ready(self, spec: ActorSpec, group: PlacementGroup) -> None:
        try:
            await group.ready()
        except BaseException:
            remove_placement_group(group)
            raise
        self._reserved[spec.name] = group


def nodes_for_all_ranks(spec: ActorSpec, specs: Sequence[ActorSpec], nodes: Sequence[Node]) -> list[int]:
    """Return the nodes that hold all ranks of an actor and leave room for the other actors."""
    others = [other for other in specs if other is not spec]
    fitting = []
    for i, node in enumerate(nodes):
        rest = [*nodes[:i], _remaining(spec, node), *nodes[i + 1 :]]
        if _holds_all_ranks(spec, node) and not _first_unplaced(others, rest):
            fitting.append(i)
    return fitting


def _holds_all_ranks(spec: ActorSpec, node: Node) -> bool:
    remaining = _remaining(spec, node)
    return remaining.cpus >= 0 and remaining.gpus >= 0


def _remaining(spec: ActorSpec, node: Node) -> Node:
    return Node(node.cpus - spec.ranks * spec.num_cpus, node.gpus - spec.ranks * spec.num_gpus)


def _request_group(spec: ActorSpec, strategy: str, labels: Mapping[str, str] | None = None) -> PlacementGroup:
    bundle = {key: amount for key, amount in (("CPU", spec.num_cpus), ("GPU", spec.num_gpus)) if amount}
    return placement_group(
        [bundle] * spec.ranks, strategy, bundle_label_selector=labels and [dict(labels)] * spec.ranks
    )
