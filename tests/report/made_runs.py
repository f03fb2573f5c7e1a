"""Folders such as a run leaves them, made up: small, always the same, and with the unusual in them."""

import json

NASTY = "</script><script>document.title = 'taken'</script><b>bold</b> <!-- {{data}} & \u2028 ü"


def make_run(
    folder,
    *,
    steps=12,
    concurrency=4,
    groups=6,
    timeline=3,
    summary=True,
    tokens=True,
    deaths=True,
    episodes=False,
    overrides=(),
):
    folder.mkdir(parents=True, exist_ok=True)
    config = f"rollout:\n  concurrency: {concurrency}\ntrainer:\n  groups_per_step: 4\nseed: 0\n"
    (folder / "config.yaml").write_text(config)
    lines = [_step(number, concurrency) for number in range(1, steps + 1)]
    sampled = [_group(number, tokens) for number in range(groups)]
    if episodes:
        lines[::2] = [line | _EPISODE_METRICS for line in lines[::2]]
        sampled.append(_episodes())
    write_jsonl(folder / "metrics.jsonl", lines)
    _write_overrides(folder, overrides)
    if sampled:
        write_jsonl(folder / "rollouts.jsonl", sampled)
    if deaths:
        write_jsonl(folder / "events.jsonl", _events())
    if timeline:
        (folder / "timeline.json").write_text(json.dumps(events(timeline)))
    if summary:
        (folder / "summary.json").write_text(json.dumps(_summary(steps)))
    return folder


def make_failed_run(folder, overrides):
    """One of a sweep whose settings were refused: it leaves what Hydra writes."""
    folder.mkdir(parents=True)
    _write_overrides(folder, overrides)


def _write_overrides(folder, overrides):
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {each}\n" for each in overrides) or "[]\n")


def write_jsonl(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def events(groups=3, slots=2):
    """Two rollouts that make groups in turn, a train step after each pair, and the actors that work for them."""
    made = [*_named(0, "driver", ["training", *(f"rollouts-{slot}" for slot in range(slots)), "rollouts-0 (2)"])]
    made += [*_named(7, "generator", ["generator"]), *_named(8, "trainer", ["trainer"])]
    for number in range(groups):
        for slot in range(slots):
            at, ticket, tid = 1000.0 * number + 10 * slot, number * slots + slot, 2 + slot
            made.append(_span(0, tid, "ticket", "wait", at, 90))
            made.append(_span(0, tid, "group", "group", at + 95, 800, ticket=ticket))
            made.append(
                {"ph": "s", "id": ticket, "name": "group", "cat": "ticket", "pid": 0, "tid": tid, "ts": at + 95}
            )
            made.append(_span(0, tid, "generator.generate", "wait", at + 100, 400))
            made.append(_span(0, tid, "reward.score", "wait", at + 502, 200))
        made.append(_span(0, 4, "reference.score", "wait", 1000 * number + 503, 300))  # side by side with the reward
        made.append(_span(0, 1, "train_step", "stage", 1000 * number + 900, 95, step=number + 1, tickets=[number * 2]))
        made.append(_span(0, 1, "trainer.train_step", "wait", 1000 * number + 905, 85))
        made.append(_span(7, 1, "decode", "busy", 1000 * number + 120, 350, rows=8))
        made.append(_span(8, 1, "train_step", "busy", 1000 * number + 906, 80))
        made.append(_span(8, 1, "forward", "busy", 1000 * number + 910, 30))
    return made


def _named(pid, process, threads):
    for tid, name in enumerate(threads, 1):
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": tid, "args": {"name": process}}
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _span(pid, tid, name, kind, begin, length, **args):
    return {"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": tid, "ts": begin, "dur": length, "args": args}


def _step(number, concurrency):
    return {
        "step": number, "wall_s": 10.0 + number, "reward/mean": number / 20, "rollout/reward_mean": number / 19,
        "loss": None if number == 3 else 0.1 / number, "trainer/grad_norm": 1.0, "trainer/entropy": 0.5 / number,
        "mismatch/logprob_abs_diff": 0.01, "mismatch/ratio_p01": 0.9, "mismatch/ratio_p50": 1.0,
        "mismatch/ratio_p99": 1.1,
        "mismatch/ess": 0.99, "mismatch/age_0/tokens": 10.0, "mismatch/age_1/tokens": 90.0, "policy_age/max": 1.0,
        "policy_age/mean": 0.9, "time/trainer_wait_s": 0.8 / concurrency, "time/train_step_s": 0.3,
        "time/weight_sync_s": 0.1, "time/step_s": 0.5 + 0.8 / concurrency, "generator/busy_fraction": 0.5,
        "generator/tokens_per_s": 100.0 * concurrency,
        "generator/completion_tokens_mean": 6.0, "generator/truncated_fraction": 0.0, "driver/loop_lag_p99_ms": 3.0,
        "driver/waiting/rollouts/ticket": 2.0, "driver/waiting/rollouts/generator.generate": 2.0,
        "recovery/restarts": int(number >= 5),
        **({"eval/step": number, "eval/reward_mean": 0.3, "eval/reward_stderr": 0.02} if number in (1, 10) else {}),
    }  # fmt: skip


def _group(number, tokens):
    group = {
        "step": number, "prompt_serial": number, "prompt": f"prompt {number} {NASTY}", "answer": "right",
        "completions": [f"first {number}", NASTY], "rewards": [1.0, 0.0 if number % 2 else 1.0],
        "policy_version": number, "shaped_rewards": [1.0, -0.5], "advantages": [0.7, -0.7],
        "reward_parts": {"task": [1.0, 0.0], "format": [0.5, 0.25]},
    }  # fmt: skip
    if tokens and number == 5:
        group["tokens"] = [[["fir", -0.01, 4], ["st 5", -3.0, 5]], [[NASTY, -1.0, 4]]]
    return group


_EPISODE_METRICS = {
    "episode/turns": 2.5, "episode/given_tokens": 3.0, "episode/generator_s": 0.4, "episode/environment_s": 0.1,
    "episode/ended_by_tokens": 0.25, "episode/ended_by_timeout": 0.0, "episode/ended_by_turns": 0.5,
    "episode/<b>moves</b>": 7.0,
}  # fmt: skip


def _episodes():
    """A group of an episode of two turns and one of a single turn."""
    first = {
        "sampled": "16", "given": "<", "reward": 0.0, "finish_reason": "stop", "sampled_tokens": 2, "given_tokens": 2,
    }  # fmt: skip
    last = {**first, "given": "", "given_tokens": 0}
    cut = {**last, "sampled": NASTY, "reward": -0.5, "finish_reason": "length", "sampled_tokens": 1}
    said = [["16", -1.0, 4], ["<eos>", 0.0, 4]]
    return _group(99, tokens=False) | {
        "completions": [f"16\n| <\n{NASTY}", "16"],
        "turns": [[first, cut], [{**last, "reward": 1.0}]],
        "ended_by": ["tokens", "done"],
        "tokens": [[*said, ["\n", None, None], ["<", None, None], [NASTY, -3.0, 5]], said],
    }


def _events():
    return [
        {"event": "resumed", "at_s": 12.0, "step": 2},
        {"event": "died", "at_s": 14.5, "actor": "generator", "error": "killed"},
        {"event": "died", "at_s": 14.75, "actor": "reward-1", "error": "<b>hung</b>"},
        {"event": "back", "at_s": 16.5, "actor": "generator", "after_s": 2.0},
    ]


def _summary(steps):
    evaluations = [
        {"step": 0, "reward_mean": 0.3, "reward_stderr": 0.02},
        {"step": steps, "reward_mean": 0.9, "reward_stderr": None},
    ]
    return {
        "status": "failed", "steps": steps, "wall_s": 30.0, "reward_first": 0.05, "reward_last": 0.6, "eval_first": 0.3,
        "eval_last": 0.9, "evaluations": evaluations, "trainer_wait_fraction": 0.25, "generator_busy_fraction": 0.5,
        "restarts": {"generator": 1, "reward-1": 1}, "resumed_at": [2],
        "error": "StalledError: <b>no step</b>",
    }  # fmt: skip
