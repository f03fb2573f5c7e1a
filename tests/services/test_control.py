import asyncio

import pytest

from grpo.errors import ControlError
from grpo.services.control import ask, open_to_operators
from grpo.services.failures import Failures
from grpo.services.local import launch_local


@pytest.fixture
async def services(tiny_config):
    tiny_config.generator.engine = "simulated"
    tiny_config.reward.workers = 1
    async with launch_local(tiny_config, Failures(tiny_config.recovery)) as services:
        yield services


async def test_an_operator_sees_the_replicas_and_scales_them(services, tmp_path):
    async with open_to_operators(tmp_path, services):
        replicas = await ask(tmp_path, {})
        assert replicas["generator"]["state"] == "healthy"
        assert set(replicas) >= {"generator", "trainer", "reward", "dataloader", "replay_buffer"}
        await ask(tmp_path, {"generator": 3})
        await asyncio.sleep(0)
        assert len([name for name in await ask(tmp_path, {}) if name.startswith("generator")]) == 3
        left = await ask(tmp_path, {"generator": 1})
        states = [figures["state"] for name, figures in left.items() if name.startswith("generator")]
        assert states[0] == "healthy"
        assert set(states[1:]) <= {"stopped"}


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"trainer": 2}, r"^trainer: can't be scaled\. Scalable services of this run: generator, reward$"),
        ({"generator": 0}, r"^generator: must be >= 1 \(0\)$"),
    ],
)
async def test_what_cannot_be_is_refused(services, tmp_path, scale, message):
    async with open_to_operators(tmp_path, services):
        with pytest.raises(ControlError, match=message):
            await ask(tmp_path, scale)


async def test_garbage_is_answered_with_an_error(services, tmp_path):
    async with open_to_operators(tmp_path, services):
        for line in (b"hello\n", b"{}\n", b'{"scale": {"generator": "many"}}\n'):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "control.sock")
            writer.write(line)
            assert b"can't read" in await reader.readline()
            writer.close()


async def test_without_a_run_there_is_nobody_to_ask(services, tmp_path):
    async with open_to_operators(tmp_path, services):
        pass
    with pytest.raises(ControlError, match="no run is active in"):
        await ask(tmp_path, {})


async def test_the_folder_of_a_run_may_have_a_long_name(services, tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    async with open_to_operators(folder, services):
        assert "generator" in await ask(folder, {})
