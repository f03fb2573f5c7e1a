"""A finished group that came with its texts: as files and as people are shown it."""

from __future__ import annotations

from typing import Any

from grpo.types import Rollout


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
