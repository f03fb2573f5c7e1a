"""Renderers of the package `renderers`: its real code, on small tokenizers with the special tokens of real models."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from grpo.config.algorithm import EnvironmentConfig, TaskConfig
from grpo.environments import Message, Opening, Reply
from grpo.environments.calls import UserCalls
from grpo.environments.model_renderer import ModelRenderer
from grpo.environments.player import Player
from grpo.environments.renderers import Context
from grpo.errors import ConfigError, EnvironmentInvalid
from grpo.tasks.base import make_renderer
from grpo.types import Completion, SamplingParams
from tests.environments.chat import CHATML, SPECIAL, chat_tokenizer
from tests.environments.scripted import PROMPT

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
LLAMA_3 = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>",
)  # fmt: skip
GLM_5 = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GEMMA_4 = (
    "<turn|>", "<bos>", "<eos>", "<|turn>", "<|channel>", "<channel|>", "<|think|>", "<|tool>", "<tool|>",
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|image>", "<|image|>", "<image|>",
)  # fmt: skip
KIMI_K2 = (
    "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
FAMILIES = {
    "qwen3": (SPECIAL, TAGS, "<|im_end|>"),
    "qwen3.5": ((*SPECIAL, *VISION), TAGS, "<|im_end|>"),
    "llama-3": (LLAMA_3, (), "<|eot_id|>"),
    "glm-5": (GLM_5, (*TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), "<|endoftext|>"),
    "gemma4": (GEMMA_4, (), "<turn|>"),
    "kimi-k2": (KIMI_K2, (), "<|im_end|>"),
}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "A function.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}, "y": {"type": "integer"}}},
    },
}


def family_tokenizer(name):
    special, words, eos = FAMILIES[name]
    return chat_tokenizer(None, special, words, eos)


class Family:
    """A renderer with its tokenizer, in texts instead of tokens."""

    def __init__(self, name):
        pytest.importorskip("renderers", reason="needs the extra renderers")
        self.tokenizer = family_tokenizer(name)
        self.renderer = ModelRenderer(self.tokenizer, [self.tokenizer.eos_token_id], name)

    def tokens(self, text):
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def text(self, tokens):
        return self.tokenizer.decode(tokens)

    def opening(self, *messages, tools=()):
        return self.text(self.renderer.opening(messages, tools))

    def continuation(self, said, *messages, prompt=None, tools=()):
        context = Context(self.tokens(prompt or self.opening(user("q"), tools=tools)), tools)
        return self.text(self.renderer.continuation(self.tokens(said), messages, context))

    def parse(self, said, tools=()):
        context = Context(self.renderer.opening([user("q")], tools), tools)
        return self.renderer.parse(self.tokens(said), context)


@pytest.fixture(params=FAMILIES)
def any_family(request):
    return Family(request.param)


def user(text):
    return Message("user", text)


def tool(text, number=0):
    return Message("tool", text, tool_call_id=f"call_{number}", name="f")


def calls_of(message):
    return [(call.id, call.name, call.arguments) for call in message.tool_calls]


# --- which renderer ---


def chosen(name, tokenizer=None):
    config = TaskConfig("m:T", template="chat", renderer=name)
    return make_renderer(tokenizer or chat_tokenizer(CHATML), config, [])


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "renderers", None)
    with pytest.raises(ConfigError, match=r"^task\.renderer: needs the package renderers: pip install -e '\.\[rende"):
        chosen("qwen3")


def test_auto_goes_by_the_name_on_the_hub():
    pytest.importorskip("renderers")
    tokenizer = family_tokenizer("qwen3")
    tokenizer.name_or_path = "Qwen/Qwen3-0.6B"
    assert "<|im_start|>user\nq" in tokenizer.decode(chosen("auto", tokenizer).opening([user("q")]))
    assert isinstance(chosen("qwen3", tokenizer), ModelRenderer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("auto", r"the package renderers knows no model 'my/model'; choose one of deepseek-r1, .*, qwen3, .*, or set"),
        ("qwen9", r"the package renderers has no renderer 'qwen9'; choose one of deepseek-r1, "),
        ("default", r"the package renderers has no renderer 'default'"),
        ("qwen3", r"qwen3 does not fit the tokenizer \(.*'<tool_call>' not found.*\); choose another, or set "),
    ],
)
def test_a_renderer_that_can_not_be_had_is_one_line(name, message):
    pytest.importorskip("renderers")
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.name_or_path = "my/model"
    with pytest.raises(ConfigError, match=rf"^task\.renderer: {message}") as caught:
        chosen(name, tokenizer)
    assert str(caught.value).endswith("or set task.renderer=null for the model's own chat template")
    assert "\n" not in str(caught.value)


def test_every_family_continues(any_family):
    any_family.renderer.check_continues()
    any_family.renderer.check_continues(tools=True)


def test_a_model_that_does_not_stop_at_the_end_of_a_turn_is_refused():
    family = Family("qwen3")
    other = ModelRenderer(family.tokenizer, family.tokens("<|endoftext|>").tolist(), "qwen3")
    with pytest.raises(ConfigError, match=r"^task\.renderer: qwen3 ends a turn with <\|im_end\|>, which is no stop"):
        other.check_continues()


# --- openings ---


def test_openings_are_written_as_the_family_does():
    assert Family("qwen3").opening(Message("system", "Be brief."), user("2 + 2?")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert Family("qwen3.5").opening(user("2 + 2?")) == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    llama = Family("llama-3").opening(user("2 + 2?"))
    assert llama.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date")
    assert llama.endswith("\n\n2 + 2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_tools_stand_in_the_opening(any_family):
    assert "A function." in any_family.opening(user("q"), tools=[SCHEMA])
    assert "A function." not in any_family.opening(user("q"))


def test_messages_that_are_rejected_are_one_line(any_family):
    with pytest.raises(ConfigError, match=r"^task\.renderer: \S+ rejects the messages \(.+\); set task") as caught:
        any_family.renderer.opening([])
    assert "\n" not in str(caught.value)


def test_half_a_character_of_json_is_replaced(any_family):
    lone = json.loads('"a\\ud83db"')
    assert "a?b" in any_family.opening(user(lone))
    assert "a?b" in any_family.continuation("x", user(lone))


# --- continuations ---


@pytest.mark.parametrize("name", ["qwen3", "llama-3"])
def test_turn_after_turn_gives_what_the_package_writes_for_the_whole_conversation(name):
    family = Family(name)
    end = family.tokenizer.eos_token
    conversation = [user("2 + 2?")]
    context = Context(family.renderer.opening(conversation))
    for said, more in [("4", [user("And 3 + 3?")]), ("6", [user("ü?"), user("Well?")]), ("7", [user("Thanks")])]:
        sampled = family.tokens(said + end)
        new = family.renderer.continuation(sampled, more, context)
        assert new.dtype == np.int64
        context = Context(np.concatenate([context.prompt, sampled, new]))
        conversation += [Message("assistant", said), *more]
        assert family.text(context.prompt) == family.opening(*conversation)


def test_a_turn_that_was_cut_off_gets_its_end():
    assert Family("qwen3").continuation("4", user("no")) == (
        "<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n"
    )
    assert Family("llama-3").continuation("4", user("no")) == (
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nno<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(("name", "said"), [("qwen3", "<think>\nHm"), ("qwen3.5", "Hm")])
def test_reasoning_that_was_cut_off_gets_its_end_too(name, said):
    given = Family(name).continuation(said, user("no"))
    assert given.startswith("</think><|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("name", "said", "given"),
    [
        ("qwen3", "<think>Hm<|im_end|>", "\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen3.5", "Hm<|im_end|>", "\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        ("glm-5", "Hm<|endoftext|>", "<|user|>no<|assistant|><think>"),
        ("glm-5", "Hm<|user|>", "no<|assistant|><think>"),  # the policy began the user's message: it is not begun again
        ("gemma4", "4<eos>", "<turn|>\n<|turn>user\nno<turn|>\n<|turn>model\n"),
    ],
)
def test_what_the_package_would_rewrite_stays_as_it_was_sampled(name, said, given):
    """A policy that ends its turn within its reasoning is no reason to end the run."""
    assert Family(name).continuation(said, user("no")) == given


def test_reasoning_of_earlier_turns_stays_where_it_was_sampled():
    given = Family("qwen3").continuation("<think>\nTwo and two.\n</think>\n\n4<|im_end|>", user("And 3 + 3?"))
    assert given == "\n<|im_start|>user\nAnd 3 + 3?<|im_end|>\n<|im_start|>assistant\n"


def test_answers_of_parallel_calls_are_merged_as_the_family_does():
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert Family("qwen3").continuation(f"{call}\n{call}<|im_end|>", tool("1"), tool("2", 1)) == (
        "\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert Family("llama-3").continuation('{"name": "f", "parameters": {}}<|eot_id|>', tool("1")) == (
        '<|start_header_id|>ipython<|end_header_id|>\n\n"1"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
    )


def test_the_answer_of_a_tool_comes_from_the_user_where_the_family_has_no_place_for_it():
    gemma = Family("gemma4")
    call = "<|tool_call>call:f{y:1}<tool_call|>"
    assert gemma.continuation(f"{call}<|tool_response>", tool("5"), tools=[SCHEMA]).startswith("response:f{")
    assert gemma.continuation(f"{call}<turn|>", tool("5"), tools=[SCHEMA]) == (
        "\n<|turn>user\n5<turn|>\n<|turn>model\n"
    )


def test_a_reply_without_messages_can_not_be_continued(any_family):
    with pytest.raises(EnvironmentInvalid, match=r"of task\.renderer can't continue with these messages: none$"):
        any_family.continuation("x", prompt="q")


# --- answers ---


@pytest.mark.parametrize(
    ("name", "said", "reasoning", "content"),
    [
        ("qwen3", "4<|im_end|>", None, "4"),
        ("qwen3", "<think>\nTwo and two.\n</think>\n\n4<|im_end|>", "Two and two.", "4"),
        ("qwen3", "<think>Two and", "Two and", ""),
        ("qwen3", "4 <think> 5", None, "4 <think> 5"),
        ("qwen3.5", "Two and two.\n</think>\n\n4<|im_end|>", "Two and two.", "4"),
        ("qwen3.5", "Two and", "Two and", ""),
        ("llama-3", "4<|eot_id|>", None, "4"),
        ("llama-3", "{4}", None, "{4}"),
    ],
)
def test_reasoning_is_told_apart_also_where_the_prompt_began_it(name, said, reasoning, content):
    message = Family(name).parse(said)
    assert (message.role, message.content, message.tool_calls) == ("assistant", content, ())
    assert (message.reasoning and message.reasoning.strip()) == reasoning


@pytest.mark.parametrize(
    ("name", "said", "calls"),
    [
        (
            "qwen3",
            'See.<tool_call>\n{"name": "f", "arguments": {"x": "ü"}}\n</tool_call>\n'
            '<tool_call>{"name": "g"}</tool_call>',
            [("call_0", "f", {"x": "ü"}), ("call_1", "g", {})],
        ),
        (
            "qwen3.5",  # 5 is a text or a number, as the tool has it
            "</think>See.<tool_call>\n<function=f>\n<parameter=x>\n5\n</parameter>\n<parameter=y>\n5\n</parameter>\n"
            "</function>\n</tool_call>",
            [("call_0", "f", {"x": "5", "y": 5})],
        ),
        ("llama-3", '{"name": "f", "parameters": {"x": "1"}}<|eot_id|>', [("call_0", "f", {"x": "1"})]),
        (
            "glm-5",
            "</think>See.<tool_call>g<arg_key>z</arg_key><arg_value>5</arg_value></tool_call>",
            [("call_0", "g", {"z": 5})],  # there is no such tool, which the environment says
        ),
        (
            "kimi-k2",  # writes the identifiers itself
            "See.<|tool_calls_section_begin|><|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>"
            '{"y": 1}<|tool_call_end|><|tool_calls_section_end|>',
            [("functions.f:3", "f", {"y": 1})],
        ),
    ],
)
def test_calls_of_tools_are_read_as_the_family_writes_them(name, said, calls):
    message = Family(name).parse(said, tools=[SCHEMA])
    assert calls_of(message) == calls
    assert message.content in ("See.", "")
    assert all(call.raw for call in message.tool_calls)


@pytest.mark.parametrize(
    "raw",
    [
        "", "{", "[]", "5", "null", "{}", '{"name": "f", "arguments": [1]}', '{"arguments": {}}',
        '{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": null}', "[" * 100_000,
        '{"name": "f", "arguments": {"x": ' + "9" * 10_000 + "}}", "\x00", "{'name': 'f'}",
    ],
    ids=lambda raw: raw[:30] or "empty",
)  # fmt: skip
def test_a_call_that_is_none_has_no_arguments_and_says_what_was_written(raw):
    [call] = Family("qwen3").parse(f"<tool_call>{raw}</tool_call><|im_end|>").tool_calls
    assert (call.id, call.arguments, call.raw) == ("call_0", None, raw)


def test_a_call_that_was_cut_off_is_none():
    [call] = Family("qwen3").parse('<tool_call>{"name": "f", "arguments": {}}').tool_calls
    assert (call.arguments, call.raw) == (None, '{"name": "f", "arguments": {}}')


def test_whatever_is_sampled_is_parsed_and_continued(any_family):
    renderer, tokenizer = any_family.renderer, any_family.tokenizer
    rng = np.random.default_rng(0)
    context = Context(renderer.opening([user("q")], [SCHEMA]), [SCHEMA])
    parts = [*tokenizer.get_added_vocab(), '{"name": "f", ', '"arguments": {', "}", "[", " ", "\n", "x", "1e9", "ü"]
    for _ in range(60):
        sampled = rng.integers(len(tokenizer) + 5, size=rng.integers(1, 60))  # a model may have more tokens than that
        written = "".join(rng.choice(parts, size=rng.integers(1, 25)))
        for tokens in (sampled, any_family.tokens(written)):
            said = renderer.parse(tokens, context)
            assert (said.role, type(said.content)) == ("assistant", str)
            assert all(call.arguments is None or isinstance(call.arguments, dict) for call in said.tool_calls)
            for more in ([user("no")], [tool("5")]):
                assert any_family.text(renderer.continuation(tokens, more, context)).strip()


# --- a whole episode ---


class Calculator:
    """Answers the call of its tool, then is done."""

    def __init__(self):
        self.heard = []

    async def begin(self):
        return Opening((user("2 + 2?"),), (SCHEMA,))

    async def reply(self, said):
        self.heard.append(said)
        if not said.tool_calls:
            return Reply(done=True, reward=float(said.content == "4"))
        return Reply(tuple(tool(str(call.arguments), i) for i, call in enumerate(said.tool_calls)))


async def test_the_prompt_of_a_turn_is_the_one_before_with_what_was_sampled_and_what_is_new():
    family, prompts, game = Family("qwen3.5"), [], Calculator()
    turns = iter(
        [
            "</think>\n\n<tool_call>\n<function=f>\n<parameter=x>\n5\n</parameter>\n</function>\n</tool_call><|im_end|>",
            "So it is.\n</think>\n\n4<|im_end|>",
        ]
    )

    async def policy(prompt_ids, params):
        prompts.append(prompt_ids)
        tokens = family.tokens(next(turns))
        return [Completion(tokens, np.zeros(len(tokens), np.float32), ((0, len(tokens)),), "stop")]

    calls = UserCalls(threads=1)
    environment = SimpleNamespace(begin=game.begin, reply=game.reply)
    player = Player(
        lambda problem, seed: environment,
        family.renderer,
        EnvironmentConfig(max_turns=3),
        calls,
        max_prompt_tokens=4096,
    )
    try:
        opening, [episode] = await player.play(PROMPT, SamplingParams(n=1, max_tokens=4096, seed=5), policy)
    finally:
        calls.close()
    assert calls_of(game.heard[0]) == [("call_0", "f", {"x": "5"})]
    assert game.heard[1].reasoning.strip() == "So it is."
    assert (episode.reward, episode.report.turns, episode.report.ended_by) == (1.0, 2, "done")
    said, given = episode.completion.turns[0].sampled, episode.completion.turns[0].given
    assert np.array_equal(prompts[1], np.concatenate([opening, episode.completion.token_ids[: said + given]]))
    assert family.text(prompts[1][len(opening) + said :]) == (
        "\n<|im_start|>user\n<tool_response>\n{'x': '5'}\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
