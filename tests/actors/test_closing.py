"""`close` may come at any time: a start that is broken off closes actors in whatever state they are."""

import asyncio

import pytest

from grpo.actors.specs import actor_specs


@pytest.fixture
def every_actor(tiny_config, tmp_path):
    tiny_config.loss.beta = 0.1
    tiny_config.eval.prompts = tiny_config.eval.every = 1
    tiny_config.checkpoint.every, tiny_config.checkpoint.dir = 1, str(tmp_path)
    return {spec.name: spec.cls(**spec.kwargs) for spec in actor_specs(tiny_config)}


async def test_every_actor_can_be_closed_before_it_is_set_up(every_actor):
    assert set(every_actor) >= {"dataloader", "generator", "reward", "reference", "trainer", "checkpointer"}
    for actor in every_actor.values():
        if hasattr(actor, "close"):
            await actor.close()


async def test_every_actor_can_be_closed_while_it_is_set_up(every_actor):
    for actor in every_actor.values():
        if not (hasattr(actor, "setup") and hasattr(actor, "close")):
            continue
        starting = asyncio.ensure_future(actor.setup())
        await asyncio.sleep(0)
        await actor.close()
        await asyncio.gather(starting, return_exceptions=True)  # the others may end as they like: their process does
        await actor.close()
