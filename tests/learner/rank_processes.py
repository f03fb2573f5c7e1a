"""Processes that play the ranks of a test: started once, from one that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from grpo.services.endpoint import free_port
from grpo.utils.ranks import Ranks, join, leave

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "grpo.learner.learner",
        "grpo.learner.layouts",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
    ]
)


class Died(Exception):
    """In place of the answer of a process that is gone."""


class RankProcesses:
    """`run` has functions of modules, not of fixtures, called on several ranks side by side."""

    def __init__(self) -> None:
        self._processes: list[tuple[Any, Connection]] = []

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """What `function(ranks, *args)` returns on each rank, or the exception that it raised there."""
        answers = self.answers(size, function, *args, timeout_s=timeout_s)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def answers(self, size: int, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
        """As `run`, but exceptions are returned."""
        started = [self._start() for _ in range(len(self._processes), size)]
        for _, pipe in started:
            pipe.recv()  # it is there
        self._processes += started
        rendezvous = ("127.0.0.1", free_port())
        for rank, (_, pipe) in enumerate(self._processes[:size]):
            pipe.send((Ranks(rank, size), rendezvous, timeout_s, function, args))
        answers = [_answer(process, pipe, 2 * timeout_s + 30) for process, pipe in self._processes[:size]]
        self._processes = [(process, pipe) for process, pipe in self._processes if process.is_alive()]
        return answers

    def close(self) -> None:
        for process, pipe in self._processes:
            pipe.send(None)
            process.join()

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _answer(process: Any, pipe: Connection, patience_s: float) -> Any:
    try:
        if pipe.poll(patience_s):
            return pipe.recv()
    except (EOFError, ConnectionResetError):
        pass
    process.kill()  # one that hangs must not be given the next test
    process.join()
    return Died()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send(None)
    while (task := pipe.recv()) is not None:
        pipe.send(_perform(*task))


def _perform(ranks: Ranks, rendezvous: tuple[str, int], timeout_s: float, function: Callable[..., Any], args: Any):
    try:
        join(ranks, rendezvous, "cpu", timeout_s)
        try:
            return function(ranks, *args)
        finally:
            leave()
    except Exception as error:
        return error
