"""One training with TRL's GRPOTrainer: `python -m benchmarks.peer_trl FOLDER`, in an environment that has TRL.

FOLDER holds `case.json` and `prompts.jsonl`; `training.json` and the models that were to be kept are left there.
Nothing of TRL is switched on that costs time and isn't asked for: no logs, no evaluation, no reference model.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peer_case import COMPLETIONS, SAMPLES_PER_STEP, THREADS, Case
from grpo.config.algorithm import TaskConfig
from grpo.observe.metrics import process_age_s
from grpo.tasks.base import make_task
from grpo.types import Problem


def main(folder: Path) -> None:
    torch.set_num_threads(THREADS)
    case = Case(**json.loads((folder / "case.json").read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    reward, clock = Reward(case), Clock(case, folder)
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=settings(case, folder),
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(case.model, padding_side="left"),
        callbacks=[clock],
    )
    trainer.train()
    training = {
        "startup_s": clock.startup_s,
        "ended_s": clock.ended_s,
        "mean_tokens": sum(reward.lengths) / len(reward.lengths),
        "truncated": reward.truncated / len(reward.lengths),
    }
    (folder / "training.json").write_text(json.dumps(training), encoding="utf-8")


def settings(case: Case, folder: Path) -> GRPOConfig:
    """The optimizer and the loss are those of this project's defaults, by TRL's names.

    One micro-batch is the fastest: TRL pads the whole batch to its longest completion in any case. `loss_type` dapo is
    the mean over all tokens of the batch; completions are trained on as soon as they are sampled, so that their
    log-probabilities need no second pass.
    """
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=case.steps,
        per_device_train_batch_size=SAMPLES_PER_STEP,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=1,
        num_generations=COMPLETIONS,
        max_completion_length=case.most_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=case.lr,
        lr_scheduler_type=case.lr_schedule,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=case.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Reward:
    """The task's score; counts tokens besides."""

    __name__ = "score"

    def __init__(self, case: Case) -> None:
        self._task = make_task(TaskConfig(case.task))
        self._eos = AutoTokenizer.from_pretrained(case.model).eos_token_id
        self.lengths: list[int] = []
        self.truncated = 0

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        self.lengths += [len(ids) for ids in completion_ids]
        self.truncated += sum(ids[-1] != self._eos for ids in completion_ids)
        asked = zip(prompts, answer, completions, strict=True)
        return [self._task.score(Problem(question, right), given) for question, right, given in asked]


class Clock(TrainerCallback):
    """When steps end; saves models while it stands still."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._every, self._folder = case.save_every, folder
        self._began_s = 0.0
        self.startup_s = 0.0
        self.ended_s: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began_s = self._began_s or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        now_s = time.perf_counter()
        self.ended_s.append(now_s - self._began_s)
        self.startup_s = self.startup_s or process_age_s()
        if self._every and state.global_step % self._every == 0:
            model.save_pretrained(self._folder / "models" / f"step_{state.global_step:06d}")
            self._began_s += time.perf_counter() - now_s


if __name__ == "__main__":
    main(Path(sys.argv[1]))
