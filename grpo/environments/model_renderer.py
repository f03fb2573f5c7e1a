"""Renderers of the package `renderers` (extra `renderers`), written by hand for families of models.

They read an answer's tokens instead of its text, know how a family writes reasoning and calls of tools, and of which
types the arguments are; a turn that was cut off in its reasoning gets the end of that, too.
Source: https://github.com/PrimeIntellect-ai/renderers (Apache 2.0)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from grpo.environments.base import Message, Role, ToolCall
from grpo.environments.renderers import NO_CONTEXT, Context, TokenizerRenderer, as_dict, encodable, parse_answer
from grpo.errors import ConfigError, EnvironmentInvalid
from grpo.types import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "task.renderer"
_FIX = "set task.renderer=null for the model's own chat template"


class ModelRenderer(TokenizerRenderer):
    """The renderer `name` of the package `renderers`; with `auto`, the one it has for the tokenizer's hub name.

    Reasoning of earlier turns stays where it was sampled. Raises ConfigError if the package is not installed, or has no
    renderer of that name, or one that does not fit the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], name: str) -> None:
        super().__init__(tokenizer, stop_token_ids)
        self._name, self._renderer = _make(tokenizer, name)
        self._ends: list[int] = self._renderer.get_stop_token_ids()  # first the one that usually ends a turn

    def opening(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Ints:
        try:
            tokens = self._renderer.render_ids(_plain(messages), tools=list(tools) or None, add_generation_prompt=True)
        except Exception as error:  # of any kind, each family has its own
            raise ConfigError(f"{self._name} rejects the messages ({_line(error)}); {_FIX}", key=_KEY) from error
        return np.array(tokens, dtype=np.int64)

    def parse(self, sampled: Ints, context: Context = NO_CONTEXT) -> Message:
        tools, prompt = list(context.tools) or None, context.prompt.tolist()
        try:
            said = self._renderer.parse_response(sampled.tolist(), tools=tools, prompt_ids=prompt)
        except Exception:  # the package lets some pass that a policy can provoke, with a number of 5000 digits for one
            return parse_answer(self._tokenizer.decode(sampled, skip_special_tokens=True))
        calls = tuple(_tool_call(i, call) for i, call in enumerate(said.tool_calls))
        return Message("assistant", said.content, said.reasoning_content, calls)

    def continuation(self, sampled: Ints, messages: Sequence[Message], context: Context = NO_CONTEXT) -> Ints:
        # Some families have no place for the answer of a tool after a turn that did not end with a call.
        from_user = [replace(message, role="user") if message.role == "tool" else message for message in messages]
        for more in (messages, from_user):
            for new in self._ways_on(sampled.tolist(), more, context):
                if new is not None:
                    return new
        roles = ", ".join(message.role for message in messages) or "none"
        raise EnvironmentInvalid(f"{self._name} of task.renderer can't continue with these messages: {roles}")

    def check_continues(self, *, tools: bool = False) -> None:
        if self._ends[0] not in self._stops:
            end = self._tokenizer.convert_ids_to_tokens(self._ends[0])
            raise ConfigError(
                f"{self._name} ends a turn with {end}, which is no stop token of the model; choose another, or {_FIX}",
                key=_KEY,
            )
        cases: list[tuple[Role, list[list[int]]]] = [("user", [[]]), ("tool", [[], *([end] for end in self._ends)])]
        for role, stops in cases[: 1 + tools]:
            more = [Message(role, "More", tool_call_id="call_0", name="tool")]
            if all(self._after_example(stop, more, NO_CONTEXT) is None for stop in stops):
                raise ConfigError(f"{self._name} can't continue with a {role} message; {_FIX}", key=_KEY)

    def _ways_on(self, sampled: list[int], messages: Sequence[Message], context: Context) -> Iterator[Ints | None]:
        """Yield the tokens that may follow the sampled ones, best first, and None for a way that is closed."""
        yield self._bridge(context.prompt.tolist(), sampled, messages, context)
        # The policy ended its turn within its reasoning, for example, which the package would rather write anew. What
        # was sampled stays, and is followed by what follows a proper answer.
        if sampled[-1] in self._ends:
            yield self._after_example(sampled[-1:], messages, context)
        yield self._after_example([], messages, context)

    def _after_example(self, stop: list[int], messages: Sequence[Message], context: Context) -> Ints | None:
        """Return what follows an answer that ends with `stop`; None if these messages can't follow one."""
        question, answer = _plain([Message("user", "A question"), Message("assistant", "An answer", "A thought")])
        start, tokens = len(self._renderer.render_ids([question])), self._renderer.render_ids([question, answer])
        end = next((i for i in range(len(tokens) - 1, start, -1) if tokens[i] in self._ends), len(tokens))
        return self._bridge(tokens[:start], [*tokens[start:end], *stop], messages, context)

    def _bridge(
        self, prompt: list[int], sampled: list[int], messages: Sequence[Message], context: Context
    ) -> Ints | None:
        """Return the new tokens, or None if the package would have to change the ones before them."""
        tools, before = list(context.tools) or None, [*prompt, *sampled]
        try:
            bridged = self._renderer.bridge_to_next_turn(prompt, sampled, _plain(messages), tools=tools)
        except Exception:  # of any kind, each family has its own
            return None
        if bridged is None or bridged.token_ids[: len(before)] != before:
            return None
        return np.array(bridged.token_ids[len(before) :], dtype=np.int64)


class _PackageRenderer(Protocol):
    """What is used of the package's protocol of the same name."""

    def get_stop_token_ids(self) -> list[int]: ...

    def render_ids(self, messages: list[Any], *, tools: Any = ..., add_generation_prompt: bool = ...) -> list[int]: ...

    def parse_response(self, token_ids: list[int], *, tools: Any = ..., prompt_ids: list[int] | None = ...) -> Any: ...

    def bridge_to_next_turn(self, prompt: list[int], sampled: list[int], messages: list[Any], *, tools: Any) -> Any: ...


def _make(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, _PackageRenderer]:
    if find_spec("renderers") is None:
        raise ConfigError("needs the package renderers: pip install -e '.[renderers]'", key=_KEY)
    # It takes half a second to import.
    from renderers import config_from_name, create_renderer
    from renderers.base import MODEL_RENDERER_MAP

    # Not left to the package: it looks up an unknown model on the hub, and takes a renderer that can't continue.
    names = sorted(set(MODEL_RENDERER_MAP.values()))
    chosen = MODEL_RENDERER_MAP.get(tokenizer.name_or_path) if name == "auto" else name
    if chosen not in names:
        unknown = f"knows no model {tokenizer.name_or_path!r}" if chosen is None else f"has no renderer {chosen!r}"
        raise ConfigError(f"the package renderers {unknown}; choose one of {', '.join(names)}, or {_FIX}", key=_KEY)
    try:
        # "all": also before a new question of the user, where the templates of many families drop the reasoning.
        config = type(config_from_name(chosen))(thinking_retention="all")
        return chosen, create_renderer(tokenizer, config)
    except Exception as error:  # of any kind, each family has its own
        raise ConfigError(
            f"{chosen} does not fit the tokenizer ({_line(error)}); choose another, or {_FIX}", key=_KEY
        ) from error


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**as_dict(message), "content": encodable(message.content)} for message in messages]


def _tool_call(number: int, call: Any) -> ToolCall:
    # A call of an unknown tool is a call: the environment says that there is no such tool.
    is_one = call.status in ("ok", "unknown_tool") and isinstance(call.arguments, dict)
    return ToolCall(call.id or f"call_{number}", str(call.name or ""), call.arguments if is_one else None, call.raw)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
