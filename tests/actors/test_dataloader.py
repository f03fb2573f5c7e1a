from __future__ import annotations

from dataclasses import replace

import pytest

from grpo.actors.dataloader import Dataloader
from grpo.types import ConfigError, TaskError


@pytest.fixture
def make_loader(config):
    async def make(*, seed=0, max_prompt_tokens=8):
        rollout = replace(config.rollout, max_prompt_tokens=max_prompt_tokens)
        loader = Dataloader(replace(config, seed=seed, rollout=rollout))
        await loader.setup()
        return loader

    return make


async def questions(loader, count):
    return [prompt.problem.question for prompt in await loader.sample(count)]


async def test_the_seed_decides_the_order(make_loader):
    first, again, other = [await questions(await make_loader(seed=seed), 12) for seed in (3, 3, 4)]
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


async def test_how_prompts_are_bundled_does_not_matter(make_loader):
    whole, parts = await make_loader(), await make_loader()
    assert await questions(whole, 9) == [question for count in (1, 5, 3) for question in await questions(parts, count)]


async def test_every_epoch_holds_every_problem_once_in_an_order_of_its_own(make_loader):
    loader = await make_loader()
    epochs = [await questions(loader, 12) for _ in range(3)]
    assert len(set(epochs[0])) == 12
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert (await loader.stats())["epochs"] == 3


async def test_one_call_may_ask_for_several_epochs(make_loader):
    loader = await make_loader()
    prompts = await loader.sample(50)
    assert [prompt.serial for prompt in prompts] == list(range(50))
    assert await loader.stats() == {"handed_out": 50, "epochs": 5}


async def test_serials_count_up_over_calls(make_loader):
    loader = await make_loader()
    prompts = await loader.sample(5) + await loader.sample(3)
    assert [prompt.serial for prompt in prompts] == list(range(8))


async def test_prompts_over_the_limit_are_skipped_and_counted(make_loader):
    everything = set(await questions(await make_loader(), 12))
    short = {question for question in everything if len(question) <= 5}
    assert 0 < len(short) < 12
    loader = await make_loader(max_prompt_tokens=5)
    prompts = await loader.sample(2 * len(short))
    assert {prompt.problem.question for prompt in prompts} == short
    assert max(len(prompt.token_ids) for prompt in prompts) <= 5
    assert [prompt.serial for prompt in prompts] == list(range(2 * len(short)))
    await loader.sample(1)  # the third epoch has begun, so two of them have been gone through
    stats = await loader.stats()
    assert stats["skipped_length"] >= 2 * (12 - len(short))
    assert stats["handed_out"] == 2 * len(short) + 1


async def test_prompts_are_the_questions_as_tokens(make_loader, tokenizer):
    for prompt in await (await make_loader()).sample(3):
        assert tokenizer.decode(prompt.token_ids) == prompt.problem.question


async def test_held_out_prompts_are_stable_and_apart_from_training(make_loader):
    loader, other = await make_loader(seed=0), await make_loader(seed=1)
    held_out = await loader.held_out(3)
    await loader.sample(5)
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


async def test_held_out_prompts_over_the_limit_are_counted_once_however_often_they_are_asked_for(make_loader):
    lengths = [len(prompt.token_ids) for prompt in await (await make_loader()).held_out(100)]
    limit = max(lengths) - 1
    too_long = sum(length > limit for length in lengths)
    loader = await make_loader(max_prompt_tokens=limit)
    for count in (100, 100, 0, 1):
        await loader.held_out(count)
    stats = await loader.stats()
    assert stats["held_out_skipped_length"] == too_long
    assert "skipped_length" not in stats


async def test_held_out_prompts_do_not_count_as_handed_out(make_loader):
    loader = await make_loader()
    await loader.held_out(4)
    assert (await loader.stats())["handed_out"] == 0
    assert (await loader.sample(1))[0].serial == 0
    await loader.close()


async def test_no_prompt_that_fits_is_an_error_at_the_start(make_loader):
    with pytest.raises(TaskError, match=r"rollout\.max_prompt_tokens"):
        await make_loader(max_prompt_tokens=2)


async def test_a_missing_chat_template_is_an_error_at_the_start(config):
    loader = Dataloader(replace(config, task=replace(config.task, template="chat")))
    with pytest.raises(ConfigError, match=r"task\.template"):
        await loader.setup()
