"""Where a run goes on from, found in small folders whose checkpoints hold next to nothing."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from grpo.checkpoint.resume import archive_newer_checkpoints, check_compatible, find_resume_point
from grpo.checkpoint.store import _REQUIRED, checkpoints, write_manifest
from grpo.cli import preflight
from grpo.errors import CheckpointError, ConfigError
from grpo.tasks.base import make_task
from tests.composed import composed


@pytest.fixture
def config(tiny_config):
    tiny_config.checkpoint.every = 1
    tiny_config.resume = "auto"
    return tiny_config


@pytest.fixture
def run_with(config, tmp_path):
    """Make a run's folder with checkpoints of these steps, in the order in which they were written."""

    def run_with(*steps, folder=tmp_path / "run", kept=None, status=None, config=config):
        folder.mkdir(parents=True, exist_ok=True)
        kept = kept or folder / "checkpoints"
        for name in ("config.yaml", "ledger.jsonl"):
            (folder / name).touch()
        if status is not None:
            (folder / "summary.json").write_text(json.dumps({"status": status}))
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, dir=str(kept)))
        for step in steps:
            write_checkpoint(kept / f"step_{step:06d}", step, folder, config)
        return folder

    return run_with


def write_checkpoint(path, step, run_folder, config):
    for part in ("model/config.json", *_REQUIRED, "trainer.safetensors"):
        (path / part).parent.mkdir(parents=True, exist_ok=True)
        (path / part).write_text("{}")
    progress = {"step": step, "run_folder": str(run_folder), "config": dataclasses.asdict(config), "files": {}}
    (path / "progress.json").write_text(json.dumps(progress))
    write_manifest(path)


def spoil(run, step):
    (run / f"checkpoints/step_{step:06d}/trainer.safetensors").write_text("spoilt")


def found(config, folder):
    """(step, checkpoint, folder in which the run goes on, whether that is its own), without a warning."""
    point, warnings = find_resume_point(config, folder)
    assert warnings == []
    return point.step, point.path, point.folder, point.in_place


# --- a path that is named ---


def test_without_resume_nothing_is_looked_for(config, run_with):
    config.resume = None
    assert find_resume_point(config, run_with(3)) == (None, [])


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_000006"])
def test_a_run_its_checkpoints_or_one_of_them_may_be_named(config, run_with, tmp_path, place):
    run = run_with(3, 6)
    config.resume = str(run / place)
    assert found(config, tmp_path / "new") == (6, run / "checkpoints/step_000006", run, True)


def test_an_older_checkpoint_may_be_named(config, run_with, tmp_path):
    run = run_with(3, 6)
    config.resume = str(run / "checkpoints/step_000003")
    assert found(config, tmp_path / "new") == (3, run / "checkpoints/step_000003", run, True)


def test_home_and_relative_paths_are_understood(config, run_with, tmp_path, monkeypatch):
    run = run_with(3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for config.resume in ("run", "~/run"):
        assert found(config, tmp_path / "new") == (3, run / "checkpoints/step_000003", run, True)


@pytest.mark.parametrize("there", [(), (".",), ("checkpoints",), ("checkpoints/.step_000003.unfinished",)])
def test_nothing_at_the_path_is_an_error_that_says_what_to_name(config, tmp_path, there):
    for folder in there:
        (tmp_path / "there" / folder).mkdir(parents=True)
    config.resume = str(tmp_path / "there")
    with pytest.raises(
        CheckpointError, match=r"resume: no intact checkpoint: no step_\* in .*; name a checkpoint, or a run"
    ):
        find_resume_point(config, tmp_path / "new")


def test_the_one_before_a_broken_one_is_taken_with_a_warning(config, run_with, tmp_path):
    run = run_with(3, 6, 9)
    spoil(run, 9)
    (run / "checkpoints/step_000006/manifest.json").unlink()
    for config.resume in ("auto", str(run)):
        point, warnings = find_resume_point(config, run)
        assert point.step == 3
        assert [warning.rpartition("; ")[2] for warning in warnings] == ["trying the checkpoint before it"] * 2
        assert any("step_000009/trainer.safetensors has 6 bytes" in warning for warning in warnings)


def test_nothing_but_broken_ones_is_an_error(config, run_with):
    run = run_with(3, 6)
    spoil(run, 3)
    spoil(run, 6)
    for config.resume in ("auto", str(run)):
        with pytest.raises(CheckpointError, match=r"resume: no intact checkpoint: .*/run/checkpoints/step_000006/"):
            find_resume_point(config, run)
    config.resume = str(run / "checkpoints/step_000003")
    with pytest.raises(CheckpointError, match=r"step_000003/trainer\.safetensors has 6 bytes instead of 2"):
        find_resume_point(config, run)


def test_one_that_was_not_finished_does_not_count(config, run_with):
    run = run_with(3)
    shutil.copytree(run / "checkpoints/step_000003", run / "checkpoints/.step_000006.unfinished")
    assert found(config, run)[0] == 3


# --- where it goes on ---


def test_a_run_that_was_moved_goes_on_where_it_is_now(config, run_with, tmp_path):
    moved = run_with(3).rename(tmp_path / "moved")
    config.resume = str(moved)
    assert found(config, tmp_path / "new") == (3, moved / "checkpoints/step_000003", moved, True)


def test_a_copy_of_a_run_goes_on_in_the_copy(config, run_with, tmp_path):
    copy = shutil.copytree(run_with(3), tmp_path / "copy")
    config.resume = str(copy / "checkpoints/step_000003")
    assert found(config, tmp_path / "new")[2:] == (copy, True)


def test_a_checkpoint_outside_of_any_run_goes_on_in_a_new_folder(config, run_with, tmp_path):
    copy = shutil.copytree(run_with(3) / "checkpoints/step_000003", tmp_path / "elsewhere/step_000003")
    config.resume = str(copy)
    assert found(config, tmp_path / "new") == (3, copy, tmp_path / "new", False)


def test_a_folder_with_a_config_of_something_else_is_not_taken_for_the_run(config, run_with, tmp_path):
    kept = tmp_path / "project/checkpoints"
    run = run_with(3, kept=kept)
    (tmp_path / "project/config.yaml").touch()
    config.checkpoint.dir = str(kept)
    assert found(config, tmp_path / "new") == (3, kept / "step_000003", run, True)
    shutil.rmtree(run)
    assert found(config, tmp_path / "new") == (3, kept / "step_000003", tmp_path / "new", False)


# --- auto ---


def test_auto_finds_the_run_in_a_fixed_folder(config, run_with):
    run = run_with(3, 6)
    assert found(config, run) == (6, run / "checkpoints/step_000006", run, True)


def test_auto_with_nothing_there_begins_anew_and_says_so(config, tmp_path):
    for folder in (tmp_path / "run", tmp_path / "2026-01-02/10-00-00"):
        assert find_resume_point(config, folder) == (
            None,
            ["resume=auto: no run to resume was found; starting a new one"],
        )


def test_auto_in_a_fixed_folder_looks_into_no_other(config, run_with, tmp_path):
    run_with(3, folder=tmp_path / "2026-01-02/10-00-00")
    assert find_resume_point(config, tmp_path / "2026-01-02/mine")[0] is None


def other(config, **groups):
    """The config with other values: other(config, task={"target": "x"})."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    return dataclasses.replace(config, **changed)


def test_auto_among_dated_folders_takes_the_newest_unfinished_run_of_the_same_model_and_task(
    config, run_with, tmp_path
):
    for date in ("2026-01-01/23-00-00", "2026-01-02/09-00-00"):
        run_with(3, folder=tmp_path / date, status="failed")
    wanted = run_with(3, folder=tmp_path / "2026-01-02/10-00-00")  # killed: there is no summary
    run_with(folder=tmp_path / "2026-01-02/11-00-00", status="failed")  # before its first checkpoint
    run_with(3, folder=tmp_path / "2026-01-02/12-00-00", status="completed")
    run_with(3, folder=tmp_path / "2026-01-02/13-00-00", config=other(config, task={"target": "another:Task"}))
    run_with(3, folder=tmp_path / "2026-01-02/14-00-00", config=other(config, model={"path": "another/model"}))
    (tmp_path / "2026-01-03/08-00-00/.hydra").mkdir(parents=True)
    assert found(config, tmp_path / "2026-01-03/09-00-00")[2:] == (wanted, True)
    config.model.path = None  # it is made later, of the task
    assert found(config, tmp_path / "2026-01-03/09-00-00")[2] == tmp_path / "2026-01-02/14-00-00"


def test_auto_knows_the_model_by_a_relative_path_too(config, run_with, tmp_path, monkeypatch):
    run = run_with(3, folder=tmp_path / "2026-01-02/10-00-00")
    monkeypatch.chdir(Path(config.model.path).parent)
    config.model.path = f"./{Path(config.model.path).name}"
    assert found(config, tmp_path / "2026-01-03/10-00-00")[2] == run


def test_broken_files_of_one_run_do_not_keep_auto_from_finding_it_or_another(config, run_with, tmp_path):
    run = run_with(3, 6, folder=tmp_path / "2026-01-02/10-00-00")
    (run / "checkpoints/step_000006/progress.json").write_text("{")
    (run / "summary.json").write_text("")
    hopeless = run_with(3, folder=tmp_path / "2026-01-02/11-00-00")
    (hopeless / "checkpoints/step_000003/progress.json").unlink()
    point, warnings = find_resume_point(config, tmp_path / "2026-01-03/10-00-00")
    assert (point.step, point.folder) == (3, run)
    assert len(warnings) == 1


def test_auto_looks_into_the_checkpoint_dir_first_and_then_into_the_runs_folder(config, run_with, tmp_path):
    kept = tmp_path / "kept"
    config.checkpoint.dir = str(kept)
    run_with(6, folder=tmp_path / "2026-01-02/10-00-00")
    assert find_resume_point(config, tmp_path / "2026-01-02/12-00-00")[0] is None  # not into those of other runs
    run = run_with(3)
    assert found(config, run)[:3] == (3, run / "checkpoints/step_000003", run)
    run_with(6, kept=kept)
    assert found(config, run) == (6, kept / "step_000006", run, True)


# --- settings ---


def point_of(config, folder):
    return find_resume_point(config, folder)[0]


def test_a_setting_that_an_older_version_did_not_know_had_its_default(config, run_with):
    run = run_with(2)
    point = point_of(config, run)
    del point.progress["config"]["trainer"]["weight_decay"]
    del point.progress["config"]["buffer"]
    check_compatible(config, point)
    config.trainer.weight_decay = 0.1
    with pytest.raises(ConfigError, match=r"trainer.weight_decay was 0.0, is 0.1"):
        check_compatible(config, point)


def test_a_run_from_before_there_was_a_choice_of_algorithms_goes_on(config, run_with):
    """With what Hydra composes today: a choice that is not in the old config must mean what was done then."""
    point = point_of(config, run_with(2))
    config = composed()
    before = dataclasses.asdict(config)
    for name in ("correction", "shaping", "filter", "dataloader"):
        del before[name]
    del before["trainer"]["updates_per_batch"]
    loss = before["loss"]
    before["loss"] = {name: loss[name] for name in ("name", "advantages", "beta")} | loss["args"]  # clip_low, clip_high
    point.progress["config"] = before
    check_compatible(config, point)


def test_patience_and_pace_may_change(config, run_with):
    point = point_of(config, run_with(2))
    config.filter.max_dropped_batches, config.driver.slow_callback_ms, config.rollout.target_trainer_idle = (
        40,
        200.0,
        0.2,
    )
    check_compatible(config, point)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "seed", 7), "seed was 0, is 7"),
        (lambda c: setattr(c.trainer, "lr", 0.5), "trainer.lr was 0.01, is 0.5"),
        (lambda c: setattr(c.trainer, "betas", [0.9, 0.99]), r"trainer.betas was \[0.9, 0.95\], is \[0.9, 0.99\]"),
        (lambda c: setattr(c.trainer, "groups_per_step", 4), "trainer.groups_per_step was 2, is 4"),
        (lambda c: setattr(c.rollout, "group_size", 8), "rollout.group_size was 4, is 8"),
        (lambda c: setattr(c.rollout, "temperature", 0.5), "rollout.temperature was 1.0, is 0.5"),
        (lambda c: setattr(c.buffer, "max_policy_age", 3), "buffer.max_policy_age was 1, is 3"),
        (lambda c: setattr(c.dataloader, "revisit_fraction", 0.2), "dataloader.revisit_fraction was 0.1, is 0.2"),
        (lambda c: setattr(c.loss, "beta", 0.1), "loss.beta was 0.0, is 0.1"),
        (lambda c: setattr(c.task, "target", "a:B"), "task.target was 'grpo.tasks.sorting:Sorting', is 'a:B'"),
        (lambda c: c.task.args.update(train_size=60), "task.args.train_size was 50, is 60"),
        (lambda c: c.task.args.update(new=1), "task.args.new was None, is 1"),
        (lambda c: c.reward.functions.update(task=0.5), "reward.functions.task was None, is 0.5"),
        (lambda c: setattr(c.model, "path", "another/model"), "model.path was '.*', is 'another/model'"),
    ],
)
def test_settings_that_shape_what_is_learned_are_refused_with_before_and_after(config, run_with, change, message):
    point = point_of(config, run_with(2))
    change(config)
    with pytest.raises(ConfigError, match=f"^resume: the checkpoint has other settings: {message}; set them back"):
        check_compatible(config, point)


def test_all_that_differs_is_listed(config, run_with):
    point = point_of(config, run_with(2))
    config.seed, config.trainer.lr, config.observe.log_every = 7, 0.5, 9
    with pytest.raises(ConfigError, match=r"settings: seed was 0, is 7; trainer\.lr was 0\.01, is 0\.5; set them back"):
        check_compatible(config, point)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c.trainer, "max_steps", 100),
        lambda c: setattr(c.trainer, "micro_batch_tokens", 64),
        lambda c: setattr(c.trainer, "snapshot_every", 0),
        lambda c: setattr(c.trainer, "num_cpus", 2.0),
        lambda c: setattr(c.trainer, "ranks", 2),
        lambda c: setattr(c.rollout, "concurrency", 64),
        lambda c: setattr(c.generator, "replicas", 2),
        lambda c: setattr(c.generator, "args", {"latency_s": 1.0}),
        lambda c: setattr(c.checkpoint, "every", 7),
        lambda c: setattr(c.checkpoint, "dir", "/elsewhere"),
        lambda c: setattr(c.eval, "prompts", 8),
        lambda c: setattr(c.reward, "timeout_s", 1.0),
        lambda c: setattr(c.reward, "on_error", "drop"),
        lambda c: setattr(c.cluster, "address", "auto"),
        lambda c: setattr(c.recovery, "max_restarts", 0),
        lambda c: setattr(c.watchdog, "seconds", 9.0),
        lambda c: setattr(c.observe, "log_every", 10),
        lambda c: setattr(c, "resume", "/somewhere"),
    ],
)
def test_settings_that_change_nothing_of_what_is_learned_are_free(config, run_with, change):
    point = point_of(config, run_with(2))
    change(config)
    check_compatible(config, point)


@pytest.mark.parametrize(("step", "status"), [(3, "completed"), (4, None)])
def test_nothing_is_left_of_a_run_that_had_its_last_step(config, run_with, step, status):
    point = point_of(config, run_with(step, status=status))
    with pytest.raises(ConfigError, match=rf"max_steps: nothing is left to do \(3, .* of step {step}\)"):
        check_compatible(config, point)
    config.trainer.max_steps = 5
    check_compatible(config, point)


def test_a_run_that_was_killed_between_its_last_step_and_its_summary_goes_on(config, run_with):
    check_compatible(config, point_of(config, run_with(3)))


# --- the folder is made ready ---


@pytest.fixture
def open_run(config):
    opened = []

    def open_run(folder, point=None):
        config_of_run, run_dir = preflight.open_run(config, make_task(config.task), folder, point)
        opened.append(run_dir)
        return config_of_run

    yield open_run
    for run_dir in opened:
        run_dir.close()


def test_what_was_written_after_the_checkpoint_is_put_aside(config, run_with, tmp_path, open_run):
    """A kill before the next checkpoint must not have `auto` go on with the history that was left."""
    run = run_with(3, 6, 9, status="failed")
    config.trainer.max_steps = 20
    config.resume = str(run / "checkpoints/step_000003")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    open_run(run, point_of(config, tmp_path / "new"))
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step_000003"]
    assert {path.name for path in (run / "checkpoints").glob("stale*")} == {
        "stale_step_000006",
        "stale_step_000009",
    }
    assert (run / "metrics.jsonl").read_text() == ""
    assert not (run / "summary.json").exists()
    config.resume = "auto"
    assert found(config, run)[0] == 3


def test_a_run_whose_checkpoints_are_kept_elsewhere_leads_to_them(config, run_with, tmp_path, open_run):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    config.checkpoint.every, config.checkpoint.dir = 1, str(elsewhere)
    open_run(run)
    assert (run / "checkpoints").readlink() == elsewhere
    run_with(2, folder=run, kept=elsewhere)
    config.checkpoint.dir, config.resume = None, str(run)
    assert found(config, tmp_path / "new") == (2, elsewhere / "step_000002", run, True)


def test_what_is_put_aside_replaces_what_was_put_aside_before(config, run_with):
    run = run_with(3)
    for _ in range(2):
        run_with(6)
        config.resume = str(run / "checkpoints/step_000003")
        archive_newer_checkpoints(point_of(config, run))
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_a_copy_of_a_checkpoint_leaves_the_original_and_what_is_beside_it_alone(config, run_with, tmp_path, open_run):
    run, copies = run_with(1, 2), tmp_path / "copies"
    shutil.copytree(run / "checkpoints", copies)
    (run / "ledger.jsonl").write_text("{}\n")
    config.resume = str(copies / "step_000001")
    new = tmp_path / "new"
    config_of_run = open_run(new, point_of(config, new))
    assert config_of_run.checkpoint.dir == str(new / "checkpoints")
    assert (run / "ledger.jsonl").read_text() == "{}\n"
    assert len(checkpoints(copies)) == len(checkpoints(run / "checkpoints")) == 2


def test_a_checkpoint_from_elsewhere_does_not_overwrite_the_run_in_the_folder(config, run_with, tmp_path, open_run):
    copy = shutil.copytree(run_with(1) / "checkpoints/step_000001", tmp_path / "copy/step_000001")
    another = run_with(2, folder=tmp_path / "another")
    config.resume = str(copy)
    with pytest.raises(ConfigError, match="already holds a run"):
        open_run(another, point_of(config, another))


def test_a_run_without_checkpoints_is_begun_anew_by_auto_unless_it_was_completed(config, tmp_path, open_run):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "summary.json").write_text('{"status": "completed"}')
    with pytest.raises(ConfigError, match="already holds a run"):
        open_run(run)
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'
    (run / "summary.json").write_text('{"status": "failed"}')
    open_run(run)
    assert (run / "metrics.jsonl").read_text() == ""


def test_a_new_run_does_not_displace_the_checkpoints_of_another(config, run_with, tmp_path, open_run):
    kept = tmp_path / "kept"
    run_with(3, kept=kept)
    config.resume, config.checkpoint.dir = None, str(kept)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir: .*/kept holds another run's checkpoints"):
        open_run(tmp_path / "new")


def test_a_folder_that_was_refused_is_free_again(config, run_with, open_run):
    run = run_with(2)
    point = point_of(config, run)
    config.seed = 7
    with pytest.raises(ConfigError, match="seed was 0"):
        open_run(run, point)
    config.seed = 0
    open_run(run, point)
