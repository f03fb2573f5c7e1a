"""The folder a run leaves behind. Writing happens in a thread: the event loop never waits for a disk."""

# MERGED: `events.jsonl`: what befell a run, each with the moment at which it did.
# MERGED: A finished group that came with its texts: as files and as people are shown it.

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from grpo.errors import ConfigError
from grpo.services.failures import Death
from grpo.types import Rollout

log = logging.getLogger(__name__)
_GROWING = ("metrics.jsonl", "rollouts.jsonl", "ledger.jsonl", "events.jsonl", "timeline.json")


class RunDirectory:
    """`metrics.jsonl`, `rollouts.jsonl`, `summary.json` and whatever else is written, below one path."""

    def __init__(self, path: Path) -> None:
        """Open it for a run, new or resumed. Raises ConfigError when it can't be written, or another run uses it."""
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
        """Raise ConfigError when a run has left something here."""
        if any((self.path / name).exists() for name in ("metrics.jsonl", "completions.jsonl", "checkpoints")):
            raise ConfigError(
                f"{self.path} already holds a run; name another folder, or set resume=auto to go on with it",
                key="hydra.run.dir",
            )

    def link_checkpoints(self, checkpoints: Path) -> None:
        """Have `checkpoints` here be a link where they are kept elsewhere: who names the run means them too."""
        link = self.path / "checkpoints"
        if link.absolute() != checkpoints and not link.exists():
            try:
                link.unlink(missing_ok=True)  # one that leads nowhere
                link.symlink_to(checkpoints)
            except OSError as error:  # not every file system has links, and a run can do without
                log.warning("checkpoints are in %s; no link to them: %s", checkpoints, error)

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Take the files that grow back to the moment at which `sizes` were taken, and the end that it came to."""
        (self.path / "summary.json").unlink(missing_ok=True)  # or a run that is killed now would pass for completed
        for name in _GROWING:
            file, size = self.path / name, sizes.get(name, 0)
            if file.exists() and (lost := file.stat().st_size - size) > 0:
                log.info("resuming: cut %d bytes off %s, written after the checkpoint", lost, name)
                os.truncate(file, size)

    def sizes(self) -> Future[dict[str, int]]:
        """Sizes in bytes of the files that grow, once everything queued so far is on the disk."""
        return self._writer.submit(
            lambda: {name: _size_on_disk(self.path / name) for name in _GROWING if (self.path / name).exists()}
        )

    def read(self, name: str) -> list[dict[str, Any]]:
        """The records of a jsonl file; none when it is not there."""
        file = self.path / name
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def append(self, name: str, record: dict[str, Any], **rendered: str) -> None:
        """Queue one line of a jsonl file. `rendered` are further fields, whose values are JSON already."""
        self._submit(self._append, name, record, rendered)

    def append_text(self, name: str, text: str) -> None:
        """Queue text that goes to the end of a file."""
        self._submit(self._append_text, name, text)

    def size(self, name: str) -> int:
        """In bytes, of what is on disk so far; 0 when it is not there."""
        file = self.path / name
        return file.stat().st_size if file.exists() else 0

    def write(self, name: str, text: str) -> None:
        """Queue a whole file, replaced at once."""
        self._submit(self._replace, name, text)

    def write_json(self, name: str, record: dict[str, Any]) -> None:
        self.write(name, to_json(record, indent=2) + "\n")

    def close(self) -> None:
        """Wait until everything queued is on disk."""
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
                os.truncate(file.fileno(), size)  # half of it would make the file unreadable
                raise OSError(errno.ENOSPC, "no room for all of it", name)

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)

    def _count_error(self, written: Future[None]) -> None:
        """A full disk must not end the training; it is logged, and the count stands in the summary."""
        if error := written.exception():
            self.write_errors += 1
            log.error("could not write to %s: %s", self.path, error)


def _locked(path: Path) -> IO[str]:
    """Held until it is closed or the process ends, however it does. Raises BlockingIOError while another holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _size_on_disk(path: Path) -> int:
    """A checkpoint counts on so much of the file: it has to outlive the machine, as the checkpoint does."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON in which a number that is not finite becomes null, so that every reader can parse it."""
    return json.dumps(_finite(record), indent=indent, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class Events:
    """Grows while the run goes on. `at_s` counts as `wall_s` of the metrics and the times of the timeline do."""

    def __init__(self, run_dir: RunDirectory, run_s: Callable[[float], float]) -> None:
        """`run_s` makes `at_s` of a time of time.perf_counter."""
        self._run_dir, self._run_s = run_dir, run_s

    def died(self, death: Death) -> None:
        self._add("died", self._run_s(death.at), actor=death.actor, error=death.error)

    def is_back(self, death: Death) -> None:
        """A replacement serves, `after_s` after the death."""
        assert death.back_s is not None
        self._add("back", self._run_s(death.at + death.back_s), actor=death.actor, after_s=death.back_s)

    def resumed(self, step: int, at_s: float) -> None:
        """The run goes on with what it was after `step`."""
        self._add("resumed", at_s, step=step)

    def _add(self, event: str, at_s: float, **about: object) -> None:
        self._run_dir.append("events.jsonl", {"event": event, "at_s": round(at_s, 4), **about})


def as_record(step: int, rollout: Rollout, dropped: str | None) -> dict[str, Any]:
    """What `rollouts.jsonl` has of it, but for its tokens. `dropped` is the reason, where there is one."""
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
        **({"dropped": dropped} if dropped else {}),
    }


def as_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """A row for each completion."""
    rows = zip(rollout.scores.texts, rollout.scores.rewards, rollout.group.advantages, strict=True)
    question = rollout.group.prompt.problem.question
    return [{"prompt": question, "completion": text, "reward": r, "advantage": a} for text, r, a in rows]
