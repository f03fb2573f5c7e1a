"""Weights & Biases, online or into files that `wandb sync` uploads later."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.observe.sinks.base import Rows, histogram_of, run_name, table_of

_ID_FILE = "wandb_id"
_FINISH_S = 8.0  # for uploads at the end; the rest stays in the folder for `wandb sync`
_RETRIES = 3  # W&B's default takes days: without a network, the process would not end


class WandbSink:
    """One W&B run per folder, which a resumed run continues.

    Its x axis is the metric `step`: W&B's own step can't go back, as that of a resumed run does.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        /,
        *,
        project: str = "grpo",
        name: str | None = None,
        mode: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        """`mode` is online, offline or disabled; the default is WANDB_MODE, or else online."""
        if "offline" in (mode, os.environ.get("WANDB_MODE")):
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it reports its own errors over the network
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            dir=folder,
            id=run_id(folder),
            resume="allow",
            config=dict(config),
            project=project,
            name=name or run_name(folder),
            mode=mode,  # type: ignore[arg-type]
            entity=entity,
            group=group,
            tags=list(tags),
            settings=wandb.Settings(
                silent=True,  # no prompts for keys either: the terminal shows the run
                console="off",
                finish_timeout=_FINISH_S,
                x_graphql_retry_max=_RETRIES,
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        if histogram := histogram_of(values):
            self._log(step, {name: self._wandb.Histogram(np_histogram=histogram)})

    def text(self, step: int, name: str, rows: Rows) -> None:
        if rows:
            self._log(step, {name: self._wandb.Table(**table_of(rows))})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # its process and threads, which it would keep for another run

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({**values, "step": step})


def run_id(folder: Path) -> str:
    """Return the W&B id of the run in this folder, created and stored there the first time."""
    file = folder / _ID_FILE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
