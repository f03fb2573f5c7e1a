"""Finished groups as two files: numbers in `groups.safetensors`, everything else in `groups.json`.

The tensors are the tokens of all groups, concatenated; the JSON file has the lengths:

    prompt_tokens int64   completion_tokens int64   logprobs float32   reference_logprobs float32
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from grpo.types import Completion, Group, Problem, Prompt, Turn

TENSORS, RECORDS = "groups.safetensors", "groups.json"
_DTYPES = {
    "prompt_tokens": np.int64,
    "completion_tokens": np.int64,
    "logprobs": np.float32,
    "reference_logprobs": np.float32,
}


def write_groups(folder: Path, groups: Iterable[tuple[int, Group]]) -> None:
    """Write (ticket serial, group) pairs, groups with their values. Metadata and index of problems are not kept."""
    arrays: dict[str, list[NDArray[Any]]] = {name: [np.empty(0, dtype)] for name, dtype in _DTYPES.items()}
    records = []
    for serial, group in groups:
        arrays["prompt_tokens"].append(group.prompt.token_ids)
        arrays["completion_tokens"] += [completion.token_ids for completion in group.completions]
        arrays["logprobs"] += [completion.logprobs for completion in group.completions]
        arrays["reference_logprobs"] += group.reference_logprobs or []
        records.append(_record(serial, group))
    flat = {name: np.concatenate(parts, dtype=_DTYPES[name]) for name, parts in arrays.items()}
    save_file(flat, folder / TENSORS)
    (folder / RECORDS).write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def read_groups(folder: Path) -> list[tuple[int, Group]]:
    """Return the pairs that `write_groups` wrote. Raises OSError, ValueError or KeyError for files that don't match."""
    streams = {name: _Stream(array) for name, array in load_file(folder / TENSORS).items()}
    records = json.loads((folder / RECORDS).read_text(encoding="utf-8"))
    groups = [(int(record["ticket"]), _group(record, streams)) for record in records]
    if unread := [name for name, stream in streams.items() if stream.remaining]:
        raise ValueError(f"{unread} are longer than {RECORDS} says")
    return groups


class _Stream:
    """An array that is read front to back."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array, self._at = array, 0

    @property
    def remaining(self) -> int:
        return len(self._array) - self._at

    def read(self, count: int) -> NDArray[Any]:
        if count > self.remaining:
            raise ValueError(f"{TENSORS} is shorter than {RECORDS} says")
        self._at += count
        return self._array[self._at - count : self._at].copy()  # a view would keep all groups in memory


def _record(serial: int, group: Group) -> dict[str, Any]:
    problem = group.prompt.problem
    return {
        "ticket": serial,
        "prompt": {
            "serial": group.prompt.serial,
            "question": problem.question,
            "answer": problem.answer,
            "tokens": len(group.prompt.token_ids),
        },
        "completions": [
            {
                "tokens": len(completion.token_ids),
                "versions": [[int(version), int(count)] for version, count in completion.versions],
                "finish_reason": completion.finish_reason,
                "turns": [dataclasses.asdict(turn) for turn in completion.turns],
            }
            for completion in group.completions
        ],
        "reference": group.reference_logprobs is not None,
        "rewards": [float(reward) for reward in group.rewards],
        "advantages": [float(advantage) for advantage in group.advantages],
        "oldest_version": int(group.oldest_version),
        "masked": list(group.masked),
    }


def _group(record: Mapping[str, Any], streams: Mapping[str, _Stream]) -> Group:
    prompt = record["prompt"]
    sampled = [sum(count for _, count in completion["versions"]) for completion in record["completions"]]
    return Group(
        prompt=Prompt(
            serial=prompt["serial"],
            problem=Problem(prompt["question"], prompt["answer"]),
            token_ids=streams["prompt_tokens"].read(prompt["tokens"]),
        ),
        completions=[
            Completion(
                token_ids=streams["completion_tokens"].read(completion["tokens"]),
                logprobs=streams["logprobs"].read(count),
                versions=tuple((version, run) for version, run in completion["versions"]),
                finish_reason=completion["finish_reason"],
                turns=tuple(Turn(**turn) for turn in completion.get("turns", ())),  # absent in older checkpoints
            )
            for completion, count in zip(record["completions"], sampled, strict=True)
        ],
        reference_logprobs=[streams["reference_logprobs"].read(n) for n in sampled] if record["reference"] else None,
        rewards=tuple(record["rewards"]),
        advantages=tuple(record["advantages"]),
        oldest_version=record["oldest_version"],
        masked=tuple(record.get("masked", ())),  # absent in older checkpoints
    )
