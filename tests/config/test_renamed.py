"""Settings under their old names: they work in this version, each use gives one warning line."""

import dataclasses
import subprocess
import sys
from operator import attrgetter

import pytest
import yaml

from grpo.checkpoint.resume import _with_defaults
from grpo.config import composition
from grpo.config.composition import compose, from_run, to_yaml
from grpo.config.renamed import RENAMED, rewrite_overrides, upgrade
from grpo.config.schema import RunConfig
from grpo.config.validation import dotted_keys
from grpo.errors import ConfigError

VALUES = {  # of another type or choice than 3.0
    "buffer.window": 3, "correction.weights": "mask", "eval.solved_at": 0.5, "filter.max_batches": 3,
    "filter.zero_advantage": True, "loss.kl": "k2", "model.pickled_weights": True, "model.prepare": "mine:make",
    "recovery.max_data_failures": 3, "rollout.target_wait": 0.3, "dataloader.revisit": 0.3, "correction.low": 0.3,
    "weights.backend": "gloo", "weights.transport": "collective", "shaping.overlong_zone": 0.3,
}  # fmt: skip
TOGETHER = {"correction.low": ["correction=tis"], "correction.high": ["correction=tis"],
            "shaping.overlong_zone": ["shaping=overlong_penalty"]}  # fmt: skip


def nested(key, value):
    group, name = key.split(".")
    return {group: {name: value}}


def line(old):
    return f"{old}: renamed to {RENAMED[old]}; the old name goes in the next version"


def written(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Make an experiment of the user's own; return what composes it."""
    folder = tmp_path / "configs"
    (folder / "experiment").mkdir(parents=True)

    def make(values, defaults=()):
        text = "# @package _global_\n" + yaml.safe_dump({"defaults": [*defaults, "_self_"]} | values, sort_keys=False)
        (folder / "experiment/mine.yaml").write_text(text)
        return ["+experiment=mine", f"hydra.searchpath=[file://{folder}]"]

    return make


def test_every_new_name_is_a_setting_and_no_old_one_is():
    keys = set(dotted_keys(RunConfig))
    assert set(RENAMED.values()) <= keys
    assert not keys & set(RENAMED)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_works_when_composing(old):
    value, lines = VALUES.get(old, 3.0), []
    config = compose(*TOGETHER.get(old, []), f"{old}={written(value)}", warn=lines.append)
    assert attrgetter(RENAMED[old])(config) == value
    assert lines == [line(old)]


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_works_in_an_experiment(old, experiment):
    value, lines = VALUES.get(old, 3.0), []
    words = experiment(nested(old, value))
    config = compose(*words, *TOGETHER.get(old, []), warn=lines.append)
    assert attrgetter(RENAMED[old])(config) == value
    assert lines == [line(old)]


def test_an_old_option_works_in_an_experiment(experiment):
    lines = []
    config = compose(*experiment({}, [{"override /filter": "zero_advantage"}]), warn=lines.append)
    assert config.filter.zero_variance
    assert lines == [line("filter.zero_advantage")]


def test_the_command_line_beats_an_experiment_with_an_old_name(experiment):
    for key in ("buffer.reorder_window", "buffer.window"):
        assert compose(*experiment({"buffer": {"window": 4}}), f"{key}=1", warn=print).buffer.reorder_window == 1


def test_without_a_callback_the_line_is_a_python_warning():
    with pytest.warns(FutureWarning, match=r"^buffer\.window: renamed to buffer\.reorder_window; the old name goes"):
        assert compose("buffer.window=2").buffer.reorder_window == 2


@pytest.mark.parametrize(
    ("word", "new"),
    [
        ("buffer.window=2", "buffer.reorder_window=2"),
        ("buffer.window=1,2,4", "buffer.reorder_window=1,2,4"),
        ("+buffer.window=2", "+buffer.reorder_window=2"),
        ("++buffer.window=2", "++buffer.reorder_window=2"),
        ("~buffer.window", "~buffer.reorder_window"),
        ("~buffer.window=1", "~buffer.reorder_window=1"),
        ("buffer.window=", "buffer.reorder_window="),
        ("model.prepare='a=b\nc'", "model.builder='a=b\nc'"),
        ("filter=none,zero_advantage", "filter=none,zero_variance"),
        ("weights.timeout_s=3", "weight_sync.timeout_s=3"),
    ],
)
def test_a_word_of_the_command_line_is_renamed(word, new):
    words, warnings = rewrite_overrides([word])
    assert words == [new]
    assert len(warnings) == 1
    assert rewrite_overrides([new]) == ([new], [])


@pytest.mark.parametrize(
    ("word", "new"),
    [
        ("loss.clip_low=0.1", "++loss.clip_low=0.1"),
        ("+loss.clip_low=0.1,0.2", "++loss.clip_low=0.1,0.2"),
        ("~loss.clip_low", "~loss.clip_low"),
        ("loss.beta=0.1", "loss.beta=0.1"),
        ("+loss.args.clip_low=0.1", "+loss.args.clip_low=0.1"),
        ("loss=dapo", "loss=dapo"),
    ],
)
def test_a_parameter_of_the_loss_needs_no_plus_sign(word, new):
    assert rewrite_overrides([word]) == ([new], [])


@pytest.mark.parametrize("word", ["--multirun", "-m", "--cfg", "job", "hydra.run.dir=/tmp/buffer.window=3", "x", ""])
def test_other_words_stay_as_they_are(word):
    assert rewrite_overrides([word]) == ([word], [])


def test_an_old_name_works_on_the_command_line_also_in_a_sweep(tmp_path):
    words = [f"hydra.sweep.dir={tmp_path}", "dry_run=true", "buffer.window=1,17", "loss.dual_clip=3"]
    command = [sys.executable, "-m", "grpo.cli", "train", "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f"warning: {line('buffer.window')}\n")
    assert [text for text in done.stdout.splitlines() if text.startswith("staleness")] == [
        "staleness       at most 1 versions",
        "staleness       at most 2 versions",
    ]


def test_both_names_are_refused_in_one_line():
    with pytest.raises(
        ConfigError,
        match=r"^buffer\.window: renamed to buffer\.reorder_window, which is given too; leave buffer\.window out$",
    ):
        compose("buffer.window=2", "+buffer.reorder_window=3")


def test_an_old_name_in_a_mapping_is_explained():
    with pytest.raises(ConfigError, match=r"^rollout\.target_wait: renamed to rollout\.target_trainer_idle$"):
        compose("rollout={target_wait: 0.2}")


def old_form(config):
    """Write a config as the version before did."""
    values = dataclasses.asdict(config)
    for old, new in RENAMED.items():
        (group, name), (new_group, new_name) = old.split("."), new.split(".")
        values.setdefault(group, {})[name] = values[new_group].pop(new_name)
    del values["weight_sync"]
    own = ("clip_low", "clip_high", "dual_clip", "max_ratio", "max_tv")
    loss = dict.fromkeys(own) | values["loss"] | values["loss"]["args"] | {"args": {}}
    return values | {"loss": loss}


def test_a_run_of_the_version_before_can_be_read(tmp_path):
    config = compose("loss=dapo", "buffer.reorder_window=3", "weight_sync.timeout_s=7", "correction=tis")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old_form(config)))
    lines = []
    assert from_run(tmp_path, warn=lines.append) == config
    (warning,) = lines
    assert warning.startswith(f"{tmp_path / 'config.yaml'}: has settings under old names, {len(RENAMED)} in all")
    changed = from_run(tmp_path, ["buffer.reorder_window=1", "weights.timeout_s=8"], warn=lines.append)
    assert (changed.buffer.reorder_window, changed.weight_sync.timeout_s) == (1, 8)
    assert lines[1] == line("weights.timeout_s")


def test_a_checkpoint_of_the_version_before_has_the_same_settings():
    config = compose("loss=dapo", "buffer.reorder_window=3", "correction=tis")
    assert _with_defaults(old_form(config)) == _with_defaults(dataclasses.asdict(config))


def test_parameters_beside_the_settings_of_the_loss_become_its_arguments():
    values, _ = upgrade({"loss": {"name": "x", "sharpness": 2.0, "speed": None, "args": {"factor": 3}}})
    assert values["loss"] == {"name": "x", "args": {"factor": 3, "sharpness": 2.0}}
    with pytest.raises(ConfigError, match=r"^loss\.args\.sharpness: give it as loss\.sharpness, without args$"):
        upgrade({"loss": {"sharpness": 2.0, "args": {"sharpness": 3.0}}}, {"loss.args.sharpness"})


def test_configs_are_those_of_the_package_or_of_the_repository():
    assert (composition.CONFIGS / "config.yaml").is_file()
    assert to_yaml(compose()).startswith("model:\n")
