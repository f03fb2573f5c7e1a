"""Costs read from a timeline whose costs are known; files that are no profile."""

import json

import numpy as np
import pytest

from grpo.config.actors import ModelConfig
from grpo.config.algorithm import TaskConfig
from grpo.config.composition import to_yaml
from grpo.config.schema import RunConfig
from grpo.errors import TuningError
from grpo.tuning.fitting import profile_of
from grpo.tuning.profile import Cost, GroupShape, Profile, load_profile, parse_lengths

DECODE = Cost(0.004, 0.0001, 0.0005)
PREFILL = Cost(0.010, 0.0002)
TRAIN = Cost(0.050, 0.001)


class MadeTimeline:
    """Events as a run leaves them, with the driver, a generator, the trainer and the reward as tracks."""

    def __init__(self):
        self.events, self._numbers = [], {}

    def span(self, process, track, name, kind, begin_s, seconds, **args):
        place = self._numbers.setdefault((process, track), len(self._numbers))
        if place == len(self._numbers) - 1:  # perhaps a new one; to be named twice does no harm
            for what, called in (("process_name", process), ("thread_name", track)):
                self.events.append({"ph": "M", "name": what, "pid": place, "tid": place, "args": {"name": called}})
        times = {"ts": begin_s * 1e6, "dur": seconds * 1e6}
        self.events.append({"ph": "X", "name": name, "cat": kind, "pid": place, "tid": place, "args": args, **times})

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        config = RunConfig(ModelConfig(path="model"), TaskConfig("tasks:Task"))
        (folder / "timeline.json").write_text(json.dumps(self.events))
        (folder / "config.yaml").write_text(to_yaml(config))
        return folder


def made_run(folder, *, slowed=0.0, steps=12):
    """In every step two groups are prefilled and decoded, one of them with a signal, and trained on; in every other
    step the trainer computes meanwhile, which makes the generator slower."""
    timeline, rng, at = MadeTimeline(), np.random.default_rng(0), 0.0
    for step in range(1, steps + 1):
        lengths = [int(n) for n in rng.integers(3, 30, 8)]
        began, contended = at, step % 2 == 0
        timeline.span("generator", "generator", "prefill", "busy", at, PREFILL(8 + step), rows=8 + step)
        at += PREFILL(8 + step)
        for token in range(2, max(lengths) + 1):
            rows, finished = sum(n >= token for n in lengths), lengths.count(token)
            seconds = DECODE(rows, finished) * (1 + slowed * contended)
            timeline.span("generator", "generator", "decode", "busy", at, seconds, rows=rows)
            at += seconds
        for half in (0, 1):
            group = {"ticket": 2 * step + half, "lengths": lengths[4 * half :][:4], "signal": half == 0}
            timeline.span("driver", f"rollouts-{half}", "group", "group", began, at - began, **group)
            timeline.span("driver", f"rollouts-{half}", "replay_buffer.add", "wait", at + half, 0.003)
            timeline.span("reward", "reward", "score", "busy", at, 0.020 * (1 + half), group=half)
        trained_s = TRAIN(sum(lengths[:4]))
        begin = began if contended else at
        seconds = at - began if contended else trained_s
        timeline.span(
            "driver", "training", "train_step", "stage", begin, seconds, step=step, tickets=[2 * step, 2 * step + 1]
        )
        timeline.span("driver", "training", "trainer.train_step", "wait", begin, seconds + 0.004)
        timeline.span("trainer", "trainer", "train_step", "busy", begin, seconds, version=step - 1)
        timeline.span("trainer", "trainer", "publish", "busy", at + 1, 0.030)
        timeline.span("driver", "training", "trainer.push_weights", "wait", at + 1, 0.034)
        timeline.span("generator", "generator", "load", "busy", at + 1.1, 0.020)
        timeline.span("driver", "training", "generator.update_weights", "wait", at + 1.1, 0.024)
        at += 5
    return timeline.save(folder)


def test_the_costs_are_found_again(tmp_path):
    profile = profile_of([made_run(tmp_path / "run")])
    assert profile.decode.base == pytest.approx(DECODE.base, rel=0.02)
    assert profile.decode.each == pytest.approx(DECODE.each, rel=0.02)
    assert profile.decode.each_finished == pytest.approx(DECODE.each_finished, rel=0.05)
    assert (profile.prefill.base, profile.prefill.each) == pytest.approx((PREFILL.base, PREFILL.each))
    assert (profile.publish, profile.load) == pytest.approx((0.030, 0.020))
    assert (profile.call, profile.step_call) == pytest.approx((0.003, 0.001))
    assert sorted(set(np.round(profile.score, 6))) == [0.020, 0.040]


def test_contention_is_told_from_the_cost(tmp_path):
    profile = profile_of([made_run(tmp_path / "run", slowed=1.0)])
    assert profile.decode.base == pytest.approx(DECODE.base, rel=0.15)
    assert profile.decode_slowed == pytest.approx(1.0, rel=0.15)


def test_no_profile_is_made_of_episodes_of_several_turns(tmp_path):
    timeline = MadeTimeline()
    timeline.span("driver", "rollouts-0", "environment.play", "wait", 0.0, 1.0)
    with pytest.raises(TuningError, match="episodes of several turns can't be simulated; leave out --simulate"):
        profile_of([timeline.save(tmp_path / "run")])


def test_groups_come_in_the_order_of_their_tickets(tmp_path):
    groups = profile_of([made_run(tmp_path / "run")]).groups
    assert len(groups) == 24
    assert [group.signal for group in groups[:4]] == [True, False, True, False]
    assert all(len(group.lengths) == 4 for group in groups)


def test_the_trainer_pays_for_tokens_with_a_signal(tmp_path):
    """Steps that are not contended, the others take as long as the generator."""
    timeline = MadeTimeline()
    tokens = [100, 200, 300, 150, 250, 350, 120, 220, 320]
    for step, count in enumerate(tokens, 1):
        at = float(step)
        for half in (0, 1):
            group = {"ticket": 2 * step + half, "lengths": [count // 2] * 2, "signal": half == 0}
            timeline.span("driver", "rollouts-0", "group", "group", at, 0.1, **group)
        timeline.span("driver", "rollouts-0", "replay_buffer.add", "wait", at, 0.002)
        timeline.span("driver", "training", "train_step", "stage", at, 0.5, step=step, tickets=[2 * step, 2 * step + 1])
        timeline.span("trainer", "trainer", "train_step", "busy", at, TRAIN(count), version=step - 1)
        timeline.span("generator", "generator", "prefill", "busy", at - 0.4, 0.01, rows=4)
        timeline.span("generator", "generator", "decode", "busy", at - 0.3, 0.01, rows=4)
    train = profile_of([timeline.save(tmp_path)]).train
    assert (train.base, train.each) == pytest.approx((TRAIN.base, TRAIN.each))


def test_a_profile_is_saved_and_read_again(tmp_path):
    profile = profile_of([made_run(tmp_path / "run")])
    profile.save(tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile


def test_faster_machines():
    profile = Profile((GroupShape((1,)),), Cost(0.1, 0.01), Cost(0.2), Cost(3.0, 0.5), score=(0.4,))
    faster = profile.scaled(generator=2, trainer=5, reward=4)
    assert (faster.decode(10), faster.prefill(1), faster.train(2)) == pytest.approx((0.1, 0.1, 0.8))
    assert faster.score == (0.1,)


@pytest.mark.parametrize("text", ["fixed", "fixed:0", "fixed:a", "geometric:3,4", "lognormal:5", "normal:3"])
def test_what_is_no_distribution_of_lengths(text):
    with pytest.raises(ValueError, match="lengths"):
        parse_lengths(text)


@pytest.mark.parametrize(("text", "mean"), [("fixed:20", 20), ("geometric:30", 30), ("lognormal:20,0.5", 22.66)])
def test_completions_of_other_lengths(text, mean):
    shapes = tuple(GroupShape((3,) * 8, signal=bool(i % 2)) for i in range(2000))
    profile = Profile(shapes, Cost(0.1), Cost(0.2), Cost(3.0), score=(0.0,))
    groups = profile.with_lengths(parse_lengths(text), most=10_000).groups
    assert np.mean([group.lengths for group in groups]) == pytest.approx(mean, rel=0.03)
    assert [group.signal for group in groups] == [shape.signal for shape in shapes]
    assert max(max(g.lengths) for g in profile.with_lengths(parse_lengths(text), most=15).groups) == 15


def test_what_no_profile_can_be_made_of(tmp_path):
    with pytest.raises(TuningError, match=r"has no timeline\.json: .*observe\.timeline=true"):
        profile_of([tmp_path])
    with pytest.raises(TuningError, match="train steps are too few"):
        profile_of([made_run(tmp_path / "short", steps=3)])
    silent = MadeTimeline()
    silent.span("trainer", "trainer", "train_step", "busy", 0.0, 1.0, version=0)
    with pytest.raises(TuningError, match=r"no decode spans: .*generator\.engine=torch"):
        profile_of([silent.save(tmp_path / "silent")])
    (tmp_path / "profile.json").write_text('{"groups": []}')
    with pytest.raises(TuningError, match="is no profile"):
        load_profile(tmp_path / "profile.json")
