"""The folder of a run: its growing files, its summary, events and sampled groups.

Writing happens in a thread: the event loop never waits for a disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from grpo.errors import ConfigError
from grpo.services.failures import Death
from grpo.types import Rollout, Scores

log = logging.getLogger(__name__)
_GROWING = ("metrics.jsonl", "rollouts.jsonl", "ledger.jsonl", "events.jsonl", "timeline.json")


class RunDirectory:
    """`metrics.jsonl`, `summary.json` and all other files of a run, below one path.

    Example:
        run_dir = RunDirectory(Path("outputs/first"))
        run_dir.append("metrics.jsonl", {"step": 1, "loss": 0.3})  # queued, returns at once
        run_dir.write_json("summary.json", {"status": "completed"})
        run_dir.close()  # waits until both are on disk
    """

    def __init__(self, path: Path) -> None:
        """Open and lock the folder. Raises ConfigError when it isn't writable or another run uses it."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(path / ".lock")
        except BlockingIOError:
            raise ConfigError(f"{path} is in use by another run; name another folder", key="hydra.run.dir") from None
        except OSError as error:
            raise ConfigError(
                f"can't write to {path}: {error.strerror}; name another folder", key="hydra.run.dir"
            ) from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="run-dir")
        self.write_errors = 0

    def refuse_old_runs(self) -> None:
        """Raise ConfigError when the folder holds files of an earlier run."""
        if any((self.path / name).exists() for name in ("metrics.jsonl", "completions.jsonl", "checkpoints")):
            raise ConfigError(
                f"{self.path} already holds a run; name another folder, or set resume=auto to continue it",
                key="hydra.run.dir",
            )

    def link_checkpoints(self, checkpoints: Path) -> None:
        """Link `checkpoints` here to the folder that holds them, so that the run's folder stands for both."""
        link = self.path / "checkpoints"
        if link.absolute() != checkpoints and not link.exists():
            try:
                link.unlink(missing_ok=True)  # a broken link
                link.symlink_to(checkpoints)
            except OSError as error:  # not every file system has links, and the run works without
                log.warning("checkpoints are in %s; no link to them: %s", checkpoints, error)

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Truncate the growing files to `sizes`, those of the checkpoint, and remove the summary."""
        (self.path / "summary.json").unlink(missing_ok=True)  # or a run killed now would pass for completed
        for name in _GROWING:
            file, size = self.path / name, sizes.get(name, 0)
            if file.exists() and (excess := file.stat().st_size - size) > 0:
                log.info("resuming: cut %d bytes off %s, written after the checkpoint", excess, name)
                os.truncate(file, size)

    def sizes(self) -> Future[dict[str, int]]:
        """Return the sizes in bytes of the growing files, once everything queued so far is on disk."""
        return self._writer.submit(
            lambda: {name: _synced_size(self.path / name) for name in _GROWING if (self.path / name).exists()}
        )

    def read(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a jsonl file; none when the file doesn't exist."""
        file = self.path / name
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def size(self, name: str) -> int:
        """Return the bytes of a file that are on disk so far; 0 when it doesn't exist."""
        file = self.path / name
        return file.stat().st_size if file.exists() else 0

    def append(self, name: str, record: dict[str, Any], **rendered: str) -> None:
        """Queue one line of a jsonl file. `rendered` are further fields whose values are JSON text already."""
        self._submit(self._append, name, record, rendered)

    def append_text(self, name: str, text: str) -> None:
        """Queue text for the end of a file."""
        self._submit(self._append_text, name, text)

    def write(self, name: str, text: str) -> None:
        """Queue a whole file, replaced atomically."""
        self._submit(self._replace, name, text)

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        self.write(name, to_json(record, indent=2) + "\n")

    def close(self) -> None:
        """Wait until everything queued is on disk, and unlock the folder."""
        self._writer.shutdown()
        self._lock.close()

    def _submit(self, *work: Any) -> None:
        self._writer.submit(*work).add_done_callback(self._count_error)

    def _append(self, name: str, record: dict[str, Any], rendered: dict[str, str]) -> None:
        fields = "".join(f', "{field}": {value}' for field, value in rendered.items())
        self._append_text(name, f"{to_json(record)[:-1]}{fields}}}\n")

    def _append_text(self, name: str, text: str) -> None:
        encoded = text.encode()
        with (self.path / name).open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if file.write(encoded) < len(encoded):
                os.truncate(file.fileno(), size)  # half a line would make the file unreadable
                raise OSError(errno.ENOSPC, "not enough room", name)

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)

    def _count_error(self, written: Future[None]) -> None:
        """Log and count a failed write: a full disk must not end the training."""
        if error := written.exception():
            self.write_errors += 1
            log.error("could not write to %s: %s", self.path, error)


class Events:
    """`events.jsonl`: deaths, recoveries and resumptions, with `at_s` on the clock of `wall_s` and the timeline."""

    def __init__(self, run_dir: RunDirectory, run_s: Callable[[float], float]) -> None:
        """`run_s` converts a time of time.perf_counter to the run's clock."""
        self._run_dir, self._run_s = run_dir, run_s

    def died(self, death: Death) -> None:
        self._add("died", self._run_s(death.at), actor=death.actor, error=death.error)

    def is_back(self, death: Death) -> None:
        """Note that a replacement serves, `after_s` after the death."""
        assert death.back_s is not None
        self._add("back", self._run_s(death.at + death.back_s), actor=death.actor, after_s=death.back_s)

    def resumed(self, step: int, at_s: float) -> None:
        """Note that the run continues from its checkpoint of `step`."""
        self._add("resumed", at_s, step=step)

    def _add(self, event: str, at_s: float, **details: object) -> None:
        self._run_dir.append("events.jsonl", {"event": event, "at_s": round(at_s, 4), **details})


def rollout_record(step: int, rollout: Rollout, dropped: str | None) -> dict[str, Any]:
    """Return the line of `rollouts.jsonl` for a group that came with its texts, without its tokens.

    `dropped` is the reason why it was not trained on, if so.
    """
    group, scores = rollout.group, rollout.scores
    return {
        "step": step,
        "prompt_serial": group.prompt.serial,
        "prompt": group.prompt.problem.question,
        "answer": group.prompt.problem.answer,
        "completions": scores.texts,
        "rewards": scores.rewards,
        "reward_parts": dict(scores.parts),
        "shaped_rewards": rollout.shaped_rewards,
        "advantages": group.advantages,
        "policy_version": group.oldest_version,
        **turns_record(scores),
        **({"dropped": dropped} if dropped else {}),
    }


def turns_record(scores: Scores) -> dict[str, Any]:
    """Return the fields of a group of episodes, `turns` and `ended_by` of each; none for single answers."""
    if not scores.transcripts:
        return {}
    episodes = list(map(asdict, scores.transcripts))
    return {name: [episode[name] for episode in episodes] for name in ("turns", "ended_by")}


def rollout_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """Return one table row for each completion of a group, for the sinks."""
    rows = zip(rollout.scores.texts, rollout.scores.rewards, rollout.group.advantages, strict=True)
    question = rollout.group.prompt.problem.question
    return [{"prompt": question, "completion": text, "reward": r, "advantage": a} for text, r, a in rows]


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Serialize to JSON; a number that is not finite becomes null, so that every reader can parse it."""
    return json.dumps(_finite(record), indent=indent, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _locked(path: Path) -> IO[str]:
    """Lock a file until it is closed or the process ends. Raises BlockingIOError while another process holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _synced_size(path: Path) -> int:
    """Return a file's size after fsync: a checkpoint refers to these bytes, so they must survive what it survives."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size
