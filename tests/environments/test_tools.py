"""Tools: schemas, calls and what may go wrong with them."""

import asyncio
import json
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import utils

from grpo.config.algorithm import EnvironmentConfig, TaskConfig
from grpo.environments import Message, Opening, Reply, ToolCall
from grpo.environments.calls import UserCalls
from grpo.environments.player import Player
from grpo.environments.tools import MethodsEnvironment, ToolEnvironment, Tools
from grpo.errors import ConfigError
from grpo.tasks.base import environment_maker
from grpo.types import Completion, Problem, SamplingParams
from tests.environments.chat import REASONING, chat
from tests.environments.scripted import PROMPT, Policy
from tests.environments.tools import calculate, search, undescribed

PROBLEM = Problem("2 + 2?", "4")


@pytest.fixture
def calls():
    calls = UserCalls(threads=4)
    yield calls
    calls.close()


@pytest.fixture
def tools(calls):
    return Tools([calculate, search], calls, key="environment.tools")


def call(name, arguments=None, *, number=0, **given):
    return ToolCall(f"call_{number}", name, given if arguments is None else arguments)


async def answer(tools, *calls):
    """Return the contents of the answers, and how many calls failed."""
    messages, failed = await tools.answer(calls)
    assert [(m.role, m.tool_call_id, m.name) for m in messages] == [("tool", c.id, c.name) for c in calls]
    return [message.content for message in messages], failed


def described(**functions):
    """Tools of these functions, each with a docstring."""
    for name, function in functions.items():
        function.__name__, function.__doc__ = name, "A tool."
    return list(functions.values())


# --- schemas ---


def test_the_schema_comes_from_signature_and_docstring(tools):
    first, second = (schema["function"] for schema in tools.schemas)
    assert (first["name"], first["description"]) == ("calculate", "Evaluate an arithmetic expression.")
    assert first["parameters"] == {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "for example 3 * (4 + 5)"}},
        "required": ["expression"],
    }
    assert second["parameters"]["required"] == ["query"]
    json.dumps(tools.schemas)


@pytest.mark.parametrize(
    "function", [undescribed, partial(calculate, "1"), SimpleNamespace()], ids=["undescribed", "partial", "no function"]
)
def test_a_function_that_can_not_be_described_names_the_key(calls, function):
    with pytest.raises(ConfigError, match=r"^environment\.tools: a tool needs a docstring .*, and type hints: "):
        Tools([calculate, function], calls, key="environment.tools")


def test_two_tools_of_one_name_are_refused(calls):
    with pytest.raises(ConfigError, match=r"^environment\.tools: two tools have the same name"):
        Tools([calculate, calculate], calls, key="environment.tools")


# --- calls ---


async def test_plain_and_async_functions_are_called_and_other_values_than_text_become_json(tools):
    found = await answer(tools, call("calculate", expression="3 * (4 + 5)"), call("search", query="ü", number=1))
    assert found == (["27", '["ü 0", "ü 1"]'], 0)


async def test_parallel_calls_run_together_and_are_answered_in_order(calls):
    """Each waits for the other: one after another they would wait for ever."""
    met = threading.Barrier(2)

    def first() -> str:
        met.wait(60)
        return "first"

    async def second() -> str:
        await asyncio.to_thread(met.wait, 60)
        return "second"

    tools = Tools(described(first=first, second=second), calls, key="k")
    names = ["second", "first"]
    assert await answer(tools, *(call(name, number=i) for i, name in enumerate(names))) == (names, 0)


async def test_a_call_that_can_not_be_made_is_told_to_the_policy_and_counted(tools):
    unparsable = ToolCall("call_0", "", None, raw='{"name": ')
    contents, failed = await answer(
        tools,
        unparsable,
        call("delete_everything", number=1),
        call("calculate", number=2),
        call("calculate", expression="1", colour="red", number=3),
        call("calculate", expression="1 / 0", number=4),
        call("calculate", expression="2", number=5),
    )
    assert failed == 5
    assert contents[0] == 'error: this is no call, a JSON object with name and arguments: {"name": '
    assert contents[1] == "error: no tool 'delete_everything'; there are calculate, search"
    assert contents[2].startswith("error: TypeError: ")
    assert "expression" in contents[2]
    assert "colour" in contents[3]
    assert contents[4] == "error: ZeroDivisionError: division by zero"
    assert contents[5] == "2"


async def test_a_tool_may_have_parameters_of_any_name(calls):
    def plot(function: str, self: str) -> str:
        """Plot a function.

        Args:
            function: the function
            self: anything
        """
        return function + self

    tools = Tools([plot], calls, key="k")
    assert await answer(tools, call("plot", {"function": "x", "self": "y"})) == (["xy"], 0)


def sampled(tokenizer, text):
    tokens = tokenizer.encode(text)
    return Completion(np.array(tokens), np.zeros(len(tokens), np.float32), ((0, len(tokens)),), "stop")


def circular():
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("result", "content"),
    [(None, "null"), (2.5, "2.5"), ({"a": 1}, '{"a": 1}'), (object, "\"<class 'object'>\"")],
    ids=str,
)
async def test_any_result_is_told(calls, result, content):
    tools = Tools(described(tool=lambda: result), calls, key="k")
    assert await answer(tools, call("tool")) == ([content], 0)


@pytest.mark.parametrize("result", [circular(), {(1, 2): 3}], ids=["circular", "keys"])
async def test_a_result_that_is_no_json_is_an_error_of_the_tool(calls, result):
    tools = Tools(described(tool=lambda: result), calls, key="k")
    [content], failed = await answer(tools, call("tool"))
    assert (content.startswith("error: "), failed) == (True, 1)


@pytest.mark.parametrize("in_thread", [True, False])
@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(2), TimeoutError(), asyncio.CancelledError()], ids=repr)
async def test_whatever_a_tool_raises_is_told(calls, error, in_thread):
    def fails():
        raise error

    async def fails_here():
        raise error

    tools = Tools(described(tool=fails if in_thread else fails_here), calls, key="k")
    [content], failed = await answer(tools, call("tool"))
    assert (content.startswith(f"error: {type(error).__name__}: "), failed) == (True, 1)


async def test_calls_are_cancelled_with_their_episode(calls):
    started, ended = asyncio.Event(), []

    async def waits():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    answering = asyncio.ensure_future(Tools(described(tool=waits), calls, key="k").answer([call("tool")]))
    await started.wait()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert ended == [True]


# --- environments of tools ---


async def test_a_question_with_tools_is_over_when_there_is_no_call(tools):
    environment = ToolEnvironment([Message("user", "2 + 2?")], tools, lambda answer: float(answer == "4"))
    assert await environment.begin() == Opening((Message("user", "2 + 2?"),), tools.schemas)
    calls = call("calculate", expression="2 + 2"), call("nothing", number=1)
    reply = await environment.reply(Message("assistant", "Let me see.", tool_calls=calls))
    assert reply.messages[0].content == "4"
    assert (reply.done, reply.reward, reply.metrics) == (False, 0.0, {"tool_calls": 2, "tool_errors": 1})
    assert await environment.reply(Message("assistant", "4")) == Reply(done=True)
    assert environment.score() == 1.0


class Light:
    """An object whose methods are tools."""

    def __init__(self, told=None):
        self.told, self.closed = told, False

    def reset(self, problem):
        self.on = False
        return self.told

    @property
    def colour(self) -> str:
        raise KeyError("nobody asked")

    def switch(self) -> str:
        """Flip the switch."""
        self.on = not self.on
        return "on" if self.on else "off"

    async def look(self, closely: bool = False) -> bool:
        """Look at the light.

        Args:
            closely: or from afar
        """
        return self.on

    def _wire(self):
        """Not for the policy."""

    async def reward(self):
        return float(self.on)

    def close(self):
        self.closed = True


async def test_public_methods_of_an_object_are_tools(calls):
    light = Light()
    environment = MethodsEnvironment(light, PROBLEM, calls)
    opening = await environment.begin()
    assert opening.messages == (Message("user", "2 + 2?"),)
    assert [tool["function"]["name"] for tool in opening.tools] == ["look", "switch"]
    reply = await environment.reply(Message("assistant", "", tool_calls=(call("switch"),)))
    assert reply.messages[0].content == "on"
    assert await calls.run(environment.score) == 1.0
    await environment.close()
    assert light.closed


async def test_what_reset_returns_is_the_first_message(calls):
    assert (await MethodsEnvironment(Light("It is dark."), PROBLEM, calls).begin()).messages == (
        Message("user", "It is dark."),
    )


async def test_an_object_without_close_needs_none(calls):
    class Bulb:
        def reset(self, problem):
            return None

        def reward(self):
            return 1.0

    environment = MethodsEnvironment(Bulb(), PROBLEM, calls)
    assert (await environment.begin()).tools == ()
    await environment.close()


async def test_episodes_have_objects_of_their_own_and_share_the_schemas(calls, monkeypatch):
    described, real = [], utils.get_json_schema
    monkeypatch.setattr(utils, "get_json_schema", lambda function: (described.append(function), real(function))[1])

    class Lamp(Light):
        def switch(self) -> str:
            """Flip the switch."""
            return super().switch()

        async def look(self) -> bool:
            """Look at it."""
            return self.on

    make = environment_maker(SimpleNamespace(environment=lambda problem, seed: Lamp()), TaskConfig("m:T"), (), calls)
    episodes = [make(PROBLEM, 0) for _ in range(3)]
    openings = [await episode.begin() for episode in episodes]
    assert openings[0] == openings[1] == openings[2]
    assert len(described) == 2
    await episodes[0].reply(Message("assistant", "", tool_calls=(call("switch"),)))
    assert [await calls.run(episode.score) for episode in episodes] == [1.0, 0.0, 0.0]


def test_a_method_without_a_docstring_names_the_task(calls):
    class Undescribed(Light):
        def dim(self, by):
            return by

    with pytest.raises(ConfigError, match=r"^task\.target: a tool needs a docstring"):
        MethodsEnvironment(Undescribed(), PROBLEM, calls)


async def test_an_episode_with_tools_is_played_from_end_to_end(calls):
    renderer, tokenizer = chat(REASONING)
    task = SimpleNamespace(score=lambda problem, completion: float(completion == problem.answer))
    make = environment_maker(task, TaskConfig("m:T", template="chat"), ["tests.environments.tools:calculate"], calls)
    first = '<think>Hm.</think>\n<tool_call>\n{"name": "calculate", "arguments": {"expression": "2 + 2"}}\n</tool_call>'
    policy = Policy(
        [sampled(tokenizer, f"{first}<|im_end|>"), sampled(tokenizer, "4<|im_end|>")],
        [sampled(tokenizer, "5<|im_end|>")],
    )
    player = Player(make, renderer, EnvironmentConfig(), calls, max_prompt_tokens=1000)
    prompt = replace(PROMPT, problem=PROBLEM)
    opening, episodes = await player.play(prompt, SamplingParams(n=2, max_tokens=400), policy)
    assert '"name": "calculate"' in tokenizer.decode(opening)
    assert tokenizer.decode(episodes[0].completion.token_ids) == (
        f"{first}<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>"
    )
    assert [episode.reward for episode in episodes] == [1.0, 0.0]
    assert [episode.report.metrics for episode in episodes] == [{"tool_calls": 1, "tool_errors": 0}, {}]


# --- what a config names ---


async def test_any_task_with_tools_has_an_environment_that_it_scores(calls):
    task = SimpleNamespace(score=lambda problem, completion: float(completion == problem.answer))
    config = TaskConfig("m:T", template="chat", system_prompt="Be brief.")
    environment = environment_maker(task, config, ["tests.environments.tools.calculate"], calls)(PROBLEM, 0)
    opening = await environment.begin()
    assert [message.role for message in opening.messages] == ["system", "user"]
    assert [tool["function"]["name"] for tool in opening.tools] == ["calculate"]
    await environment.reply(Message("assistant", "4"))
    assert environment.score() == 1.0


def test_tools_beside_an_environment_of_the_tasks_own_are_refused(calls):
    task = SimpleNamespace(environment=lambda problem, seed: None)
    with pytest.raises(ConfigError, match=r"^environment\.tools: m:T has an environment of its own"):
        environment_maker(task, TaskConfig("m:T"), ["tests.environments.tools:calculate"], calls)


@pytest.mark.parametrize("name", ["nothing", "tests.environments.tools:nothing", "tests.nothing:calculate"])
def test_a_tool_that_is_not_there_names_the_key(calls, name):
    with pytest.raises(ConfigError, match=r"^environment\.tools: "):
        environment_maker(SimpleNamespace(), TaskConfig("m:T"), [name], calls)


def test_an_environment_that_is_none_is_refused(calls):
    make = environment_maker(SimpleNamespace(environment=lambda problem, seed: 5), TaskConfig("m:T"), (), calls)
    with pytest.raises(ConfigError, match=r"^task\.target: its environment is of type int, which has neither"):
        make(PROBLEM, 0)
