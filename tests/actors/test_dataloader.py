from __future__ import annotations

from dataclasses import replace

import pytest

from grpo.actors.dataloader import Dataloader
from grpo.errors import ConfigError, TaskError
from grpo.tasks.base import make_task


@pytest.fixture
def make_loader(config):
    async def make(*, seed=0, max_prompt_tokens=8):
        rollout = replace(config.rollout, max_prompt_tokens=max_prompt_tokens)
        loader = Dataloader(replace(config, seed=seed, rollout=rollout))
        await loader.setup()
        return loader

    return make


async def questions(loader, count, start=0):
    return [prompt.problem.question for prompt in (await loader.sample(start, count)).prompts]


async def test_the_seed_decides_the_order(make_loader):
    first, again, other = [await questions(await make_loader(seed=seed), 12) for seed in (3, 3, 4)]
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


async def test_how_prompts_are_bundled_does_not_matter(make_loader):
    loader = await make_loader()
    parts = [
        question for start, count in ((0, 1), (1, 5), (6, 3)) for question in await questions(loader, count, start)
    ]
    assert await questions(loader, 9) == parts


async def test_a_new_process_goes_on_where_another_was(make_loader):
    first, second = await make_loader(), await make_loader()
    before = await first.sample(0, 5)
    after = await second.sample(before.next_serial, 50)
    whole = await (await make_loader()).sample(0, 55)
    assert [p.problem for p in before.prompts + after.prompts] == [p.problem for p in whole.prompts]


async def test_a_prompt_is_found_again_by_its_serial(make_loader):
    loader = await make_loader()
    for prompt in (await loader.sample(0, 30)).prompts:
        again = await loader.prompt(prompt.serial)
        assert (again.serial, again.problem) == (prompt.serial, prompt.problem)
        assert again.token_ids.tolist() == prompt.token_ids.tolist()


async def test_every_epoch_holds_every_problem_once_in_an_order_of_its_own(make_loader):
    loader = await make_loader()
    epochs = [await questions(loader, 12, start) for start in (0, 12, 24)]
    assert len(set(epochs[0])) == 12
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert (await loader.stats())["problems"] == 12


async def test_one_call_may_ask_for_several_epochs(make_loader):
    batch = await (await make_loader()).sample(0, 50)
    assert [prompt.serial for prompt in batch.prompts] == list(range(50))
    assert batch.next_serial == 50


async def test_prompts_over_the_limit_are_skipped_and_leave_gaps(make_loader):
    whole = (await (await make_loader()).sample(0, 24)).prompts
    short = {prompt.serial: prompt.problem for prompt in whole if len(prompt.token_ids) <= 5}
    assert 0 < len(short) < 24
    loader = await make_loader(max_prompt_tokens=5)
    batch = await loader.sample(0, len(short))
    assert {prompt.serial: prompt.problem for prompt in batch.prompts} == short
    assert batch.next_serial == max(short) + 1
    skipped = next(serial for serial in range(24) if serial not in short)
    with pytest.raises(KeyError):
        await loader.prompt(skipped)


async def test_prompts_know_their_place_among_the_problems_of_the_task(make_loader, config):
    loader = await make_loader()
    problems = make_task(config.task).problems("train")
    prompts = (await loader.sample(0, 24)).prompts
    assert all(problems[prompt.problem_index] == prompt.problem for prompt in prompts)
    assert {prompt.problem_index for prompt in await loader.held_out(4)} == {-1}


async def test_what_is_left_out_leaves_gaps_and_comes_back_where_seed_and_place_say(make_loader):
    left_out = frozenset(range(0, 12, 2))
    loader, other = await make_loader(), await make_loader(seed=1)
    everything = (await loader.sample(0, 2400)).prompts
    batch = await loader.sample(0, 1300, left_out)
    kept = {prompt.serial for prompt in batch.prompts}
    assert [p.serial for p in everything[: batch.next_serial] if p.serial not in kept] == list(batch.left_out)
    assert {everything[serial].problem_index for serial in batch.left_out} == left_out
    revisited = [prompt.serial for prompt in batch.prompts if prompt.problem_index in left_out]
    assert len(revisited) / (batch.next_serial / 2) == pytest.approx(0.1, abs=0.03)
    again = await loader.sample(revisited[7], 1, frozenset(range(12)))  # whatever else is left out
    assert again.prompts[0].serial == revisited[7]
    assert (await other.sample(0, 1300, left_out)).left_out != batch.left_out


async def test_prompts_are_the_questions_as_tokens(make_loader, tokenizer):
    for prompt in (await (await make_loader()).sample(0, 3)).prompts:
        assert tokenizer.decode(prompt.token_ids) == prompt.problem.question


async def test_held_out_prompts_are_stable_and_apart_from_training(make_loader):
    loader, other = await make_loader(seed=0), await make_loader(seed=1)
    held_out = await loader.held_out(3)
    await loader.sample(0, 5)
    for prompts in (await loader.held_out(3), await other.held_out(3)):
        assert [(p.serial, p.problem) for p in prompts] == [(p.serial, p.problem) for p in held_out]
    assert len(held_out) == 3
    assert not {prompt.problem.question for prompt in held_out} & set(await questions(loader, 12))


async def test_held_out_gives_what_there_is_and_nothing_too_long(make_loader):
    loader = await make_loader()
    everything = await loader.held_out(100)
    assert len(everything) == 4
    assert len({prompt.serial for prompt in everything}) == 4
    assert await loader.held_out(0) == []
    limit = max(len(prompt.token_ids) for prompt in everything) - 1
    short = [p.problem for p in everything if len(p.token_ids) <= limit]
    assert [p.problem for p in await (await make_loader(max_prompt_tokens=limit)).held_out(100)] == short


async def test_held_out_prompts_over_the_limit_are_counted(make_loader, config):
    lengths = [len(prompt.token_ids) for prompt in await (await make_loader()).held_out(100)]
    limit = max(lengths) - 1
    config.eval.prompts = 100
    loader = await make_loader(max_prompt_tokens=limit)
    assert (await loader.stats())["held_out_skipped_length"] == sum(length > limit for length in lengths)


async def test_no_prompt_that_fits_is_an_error_at_the_start(make_loader):
    with pytest.raises(TaskError, match=r"rollout\.max_prompt_tokens"):
        await make_loader(max_prompt_tokens=2)


async def test_a_missing_chat_template_is_an_error_at_the_start(config):
    loader = Dataloader(replace(config, task=replace(config.task, template="chat")))
    with pytest.raises(ConfigError, match=r"task\.template"):
        await loader.setup()
