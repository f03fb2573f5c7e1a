from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.checkpoint import store
from grpo.checkpoint.store import (
    checkpoints,
    latest_good,
    load_groups,
    load_progress,
    load_trainer,
    prune,
    save_checkpoint,
    verify,
    write_manifest,
)
from grpo.config.actors import ModelConfig
from grpo.errors import CheckpointError
from grpo.models.export import export_model
from grpo.models.tiny import tiny_llama
from grpo.types import Batch, Completion, Problem, Prompt, Turn

PROGRESS = {"step": 3, "prompts": [1, 2], "reward_first": 0.25, "note": "größer"}


@pytest.fixture
def learner(make_learner, make_group):
    learner = make_learner(age_bound=9)
    learner.train_step(Batch([make_group(4, [6, 1, 3], [1.2, -0.7, -0.5])]))
    return learner


@pytest.fixture
def groups(make_group):
    odd = make_group(5, [7, 1], [0.1, -1 / 3], seed=5, version=2)
    odd = dataclasses.replace(
        odd,
        prompt=Prompt(41, Problem('say "größer"\n', "größer"), odd.prompt.token_ids),
        completions=[
            dataclasses.replace(odd.completions[0], versions=((2, 3), (3, 4)), finish_reason="length"),
            odd.completions[1],
        ],
    )
    return [(3, make_group(4, [6, 2], [1.0, -1.0], reference=True)), (7, odd)]


@pytest.fixture
def export(tiny_model_path):
    return partial(_export, ModelConfig(path=tiny_model_path))


def _export(source, parameters, folder):
    export_model(source, parameters, torch.bfloat16, folder)


@pytest.fixture
def save(learner, groups, export, tmp_path):
    def save(step, folder=tmp_path / "checkpoints", *, groups=groups, progress=PROGRESS, export=export):
        return save_checkpoint(folder, step, [learner.state()], groups, progress, export)

    return save


def plain(group):
    return json.dumps(dataclasses.asdict(group), default=np.ndarray.tolist)


# --- round trips ---


def test_a_checkpoint_holds_what_the_design_pins(save):
    path = save(100)
    assert path.name == "step_000100"
    assert os.listdir(path.parent) == [path.name]
    assert {file.name for file in path.iterdir()} == {
        "model",
        "trainer.safetensors",
        "trainer.json",
        "groups.safetensors",
        "groups.json",
        "progress.json",
        "manifest.json",
    }
    verify(path)
    for file in path.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))


def test_a_learner_goes_on_from_a_checkpoint_bit_for_bit(save, learner, make_learner, make_group):
    states = load_trainer(save(1))
    other = make_learner(tiny_llama(width=32, layers=2, heads=2, seed=5), age_bound=9)
    other.restore(states)
    found, expected = dict(other.state().tensors()), dict(learner.state().tensors())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (other.state().version, other.state().counters) == (1, learner.state().counters)
    batch = Batch([make_group(3, [5, 5], [1.0, -1.0], seed=8, version=1)])
    assert other.train_step(batch) == learner.train_step(batch)
    assert (other.weights().buffer == learner.weights().buffer).all()


def test_groups_come_back_as_they_were(save, groups):
    loaded = load_groups(save(1))
    assert [serial for serial, _ in loaded] == [3, 7]
    for (_, a), (_, b) in zip(loaded, groups, strict=True):
        assert plain(a) == plain(b)
        for completion in a.completions:
            assert (completion.token_ids.dtype, completion.logprobs.dtype) == (np.int64, np.float32)
    assert load_groups(save(2, groups=[])) == []


@pytest.fixture
def episodes(groups):
    """A group of two episodes, of three turns and of one, with reference log-probabilities of the sampled tokens."""
    _, group = groups[0]
    turns = Turn(2, given=3, reward=0.5), Turn(1, finish_reason="length"), Turn(3, reward=-1.0)
    completions = [
        Completion(np.arange(9), np.full(6, -0.5, np.float32), ((0, 2), (1, 4)), "stop", turns),
        Completion(np.arange(4), np.full(4, -1.5, np.float32), ((1, 4),), "length", (Turn(4, finish_reason="length"),)),
    ]
    reference = [np.full(6, -0.25, np.float32), np.full(4, -0.75, np.float32)]
    return dataclasses.replace(group, completions=completions, reference_logprobs=reference)


def test_episodes_come_back_with_their_turns(save, groups, episodes):
    loaded = [group for _, group in load_groups(save(1, groups=[(5, episodes), *groups]))]
    assert [plain(group) for group in loaded] == [plain(group) for group in (episodes, *(g for _, g in groups))]
    assert loaded[0].completions[0].turns == episodes.completions[0].turns
    assert loaded[0].completions[0].sampled_places().tolist() == [0, 1, 5, 6, 7, 8]
    assert [len(values) for values in loaded[0].reference_logprobs] == [6, 4]
    assert loaded[1].completions[0].turns == ()


def test_groups_of_checkpoints_from_before_there_were_turns_are_read(save, groups):
    path = save(1)
    records = json.loads((path / "groups.json").read_text(encoding="utf-8"))
    for record in records:
        for completion in record["completions"]:
            del completion["turns"]
    (path / "groups.json").write_text(json.dumps(records), encoding="utf-8")
    assert [plain(group) for _, group in load_groups(path)] == [plain(group) for _, group in groups]


def test_completions_that_are_masked_stay_so(save, groups):
    (first, plain_group), (second, group) = groups
    groups = [(first, plain_group), (second, dataclasses.replace(group, masked=(1,)))]
    loaded = load_groups(save(1, groups=groups))
    assert [group.masked for _, group in loaded] == [(), (1,)]
    assert [not group.is_zero_variance for _, group in loaded] == [not group.is_zero_variance for _, group in groups]


def test_a_checkpoint_from_before_there_were_masks_has_none(save):
    path = save(1)
    records = json.loads((path / "groups.json").read_text(encoding="utf-8"))
    for record in records:
        del record["masked"]
    (path / "groups.json").write_text(json.dumps(records), encoding="utf-8")
    assert [group.masked for _, group in load_groups(path)] == [(), ()]


def test_the_metadata_of_problems_is_not_kept(save, make_group):
    group = make_group(3, [2], [0.5])
    prompt = dataclasses.replace(group.prompt, problem=Problem("?", "!", {"source": object()}))
    [(_, loaded)] = load_groups(save(1, groups=[(0, dataclasses.replace(group, prompt=prompt))]))
    assert loaded.prompt.problem == Problem("?", "!")


def test_the_drivers_own_comes_back(save):
    assert load_progress(save(1)) == PROGRESS


def test_the_model_is_an_ordinary_folder_in_the_dtype_asked_for(save, learner, tiny_model_path):
    path = save(1)
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    assert model.dtype == torch.bfloat16
    for (name, found), expected in zip(model.named_parameters(), learner.model.parameters(), strict=True):
        assert torch.equal(found, expected.to(torch.bfloat16)), name
    assert "lm_head.weight" not in load_file(path / "model/model.safetensors")  # tied
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (path / "model", tiny_model_path)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


# --- damage ---


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def remove(file):
    file.unlink()


FILES = [
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "trainer.safetensors",
    "trainer.json",
    "groups.safetensors",
    "groups.json",
    "progress.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "message"), [(flip, "wrong checksum"), (truncate, "bytes instead of"), (remove, "is missing")]
)
def test_damage_is_found_and_the_checkpoint_before_is_used(save, name, damage, message):
    before, newest = save(1), save(2)
    assert latest_good(newest.parent) == (newest, [])
    damage(newest / name)
    with pytest.raises(CheckpointError, match=message) as raised:
        verify(newest)
    assert str(newest / name) in str(raised.value)
    good, [warning] = latest_good(newest.parent)
    assert good == before
    assert str(newest / name) in warning


@pytest.mark.parametrize("damage", [remove, truncate, lambda file: file.write_text('{"files": {}}')])
def test_a_checkpoint_without_a_whole_manifest_is_not_used(save, damage):
    before, newest = save(1), save(2)
    damage(newest / "manifest.json")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(newest)
    good, [warning] = latest_good(newest.parent)
    assert (good, "manifest.json" in warning) == (before, True)


def test_without_a_good_checkpoint_there_is_none(save, tmp_path):
    assert latest_good(tmp_path / "nowhere") == (None, [])
    path = save(1)
    (path / "progress.json").unlink()
    good, [_] = latest_good(path.parent)
    assert good is None


def test_nan_in_the_weights_is_refused_even_with_a_manifest_to_fit(save, make_learner):
    path = save(1)
    tensors = load_file(path / "trainer.safetensors")
    tensors["model.model.norm.weight"][2] = math.nan
    save_file(tensors, path / "trainer.safetensors")
    (path / "manifest.json").unlink()
    write_manifest(path)
    verify(path)
    other = make_learner(tiny_llama(width=32, layers=2, heads=2, seed=5))
    before = other.state().buffer.copy()
    with pytest.raises(CheckpointError, match=r"^model\.model\.norm\.weight holds NaN"):
        other.restore(load_trainer(path))
    assert (other.state().buffer == before).all()


@pytest.mark.parametrize("load", [load_trainer, load_groups, load_progress])
def test_what_can_not_be_read_is_a_typed_error(save, load):
    path = save(1)
    for name in ("trainer.json", "groups.json", "progress.json"):
        (path / name).write_text("{")
    with pytest.raises(CheckpointError, match=f"{path} can't be read"):
        load(path)


def test_groups_that_do_not_belong_together_are_refused(save, groups):
    one, two = save(1, groups=groups[:1]), save(2, groups=groups)
    shutil.copy(two / "groups.json", one)
    with pytest.raises(CheckpointError, match="is shorter than"):
        load_groups(one)
    shutil.copy(save(3, groups=groups[:1]) / "groups.json", two)
    with pytest.raises(CheckpointError, match="are longer than"):
        load_groups(two)


# --- crashes, replacing, pruning ---


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_a_crash_leaves_nothing_that_counts_and_the_next_save_cleans_up(save, tmp_path):
    folder = tmp_path / "checkpoints"
    before = save(1)
    shutil.copytree(before, folder / ".step_000002.unfinished")  # as a power cut leaves it: nobody cleaned up
    assert checkpoints(folder) == [before]
    assert latest_good(folder) == (before, [])
    assert leftovers(folder)
    save(3)
    assert leftovers(folder) == []


def test_an_error_while_saving_is_raised_as_it_is_and_leaves_nothing(save, tmp_path):
    def failing(parameters, folder):
        folder.mkdir()
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        save(1, export=failing)
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_checkpoint_of_the_same_step_is_replaced(save):
    path = save(5, progress={"try": 1})
    assert save(5, progress={"try": 2}) == path
    assert load_progress(path) == {"try": 2}
    assert os.listdir(path.parent) == [path.name]
    verify(path)


def test_an_error_while_replacing_keeps_the_old_one(save, monkeypatch):
    path = save(5, progress={"try": 1})

    def failing(folder):
        raise OSError("the disk is gone")

    monkeypatch.setattr(store, "write_manifest", failing)
    with pytest.raises(CheckpointError, match="step 5 can't be written: the disk is gone"):
        save(5, progress={"try": 2})
    assert load_progress(path) == {"try": 1}
    assert os.listdir(path.parent) == [path.name]


def test_a_crash_in_the_middle_of_replacing_keeps_the_old_one(save):
    path = save(5)
    path.rename(path.with_name(".step_000005.replaced"))
    assert latest_good(path.parent) == (path, [])
    path.rename(path.with_name(".step_000005.replaced"))
    assert checkpoints(save(6).parent) == [path.with_name("step_000006"), path]


def test_the_newest_is_the_one_written_last(save):
    """A run that went on from step 20 has written step 30 after the step 40 that it left behind."""
    written = [save(step) for step in (20, 40, 30)]
    (written[0].parent / "step_notes").mkdir()
    (written[0].parent / "step_000050").touch()
    assert checkpoints(written[0].parent) == [written[2], written[1], written[0]]
    prune(written[0].parent, keep=2)
    assert checkpoints(written[0].parent) == [written[2], written[1]]
    prune(written[0].parent, keep=1)
    assert checkpoints(written[0].parent) == [written[2]]
    assert leftovers(written[0].parent) == []


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_checkpoints_before_as_they_were(save, small_disk):
    """Wherever in the checkpoint the space ends."""
    before, messages = save(1, small_disk), []
    size = sum(file.stat().st_size for file in before.rglob("*"))
    for room in range(20_000, size + 100_000, 40_000):
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "ballast").write_bytes(bytes(free - room))
        try:
            after = save(2, small_disk)
        except CheckpointError as error:
            messages.append(str(error))
            assert latest_good(small_disk) == (before, [])
            assert leftovers(small_disk) == []
        else:
            verify(after)
            break
        (small_disk / "ballast").unlink()
    assert len(messages) > 5
    assert {message.partition(";")[0] for message in messages} == {
        f"no space left in {small_disk} for the checkpoint of step 2"
    }
    assert latest_good(small_disk) == (after, [])
