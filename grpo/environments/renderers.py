"""Renderers: messages become tokens, and sampled tokens become a message.

What was sampled is never tokenized again. The prompt of the next turn is the prompt of this turn, the sampled tokens as
they are, then `continuation`: only the tokens that are new.

Special tokens are written by the template alone. `<|im_end|>` in a message stays text, which can't end a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jinja2 import TemplateError

from grpo.environments.base import Message, Role, ToolCall
from grpo.errors import ConfigError
from grpo.types import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "THE-ANSWER"  # stands for what was sampled, to find in a rendered text what follows it
_BASE = (Message("user", "A question"), Message("assistant", _ANSWER))
_NOTE = "\n[... {} characters left out ...]\n"
_CUT = "\ud800"  # where a text is tokenized in two parts; a lone surrogate, so no other text holds one
_CHARACTERS_PER_TOKEN = 16  # more than any text has on average
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)  # linear in the text, whatever it says


@dataclass(frozen=True)
class Context:
    """What a turn was sampled after: the tokens of its prompt [P], and the tools that the policy may call."""

    prompt: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    tools: Sequence[Mapping[str, Any]] = ()


NO_CONTEXT = Context()


class Renderer(Protocol):
    """Translation between messages and tokens, for one tokenizer and template.

    The context of a turn tells a renderer whether the prompt opened its reasoning, and of which types the arguments of
    tools are. Templates can do without it.

    Example: how the player continues an episode.

        context = Context(renderer.opening(opening.messages, opening.tools), opening.tools)
        sampled = ...                                              # the policy's turn, its stop token included
        said = renderer.parse(sampled, context)
        prompt = [*context.prompt, *sampled, *renderer.continuation(sampled, reply.messages, context)]
    """

    def opening(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
        """Return the tokens of the first prompt. Raises ConfigError if the template rejects the messages."""
        ...

    def parse(self, sampled: Ints, context: Context = NO_CONTEXT) -> Message:
        """Return what the policy said. Never raises: a call that can't be parsed has arguments None."""
        ...

    def continuation(self, sampled: Ints, messages: Sequence[Message], context: Context = NO_CONTEXT) -> Ints:
        """Return the tokens between the sampled ones and the policy's next turn.

        They begin with the end of the turn if the policy was cut off before it.
        """
        ...

    def shorten(self, text: str, max_tokens: int) -> str:
        """Return the text, cut in the middle if it is longer; it then says so."""
        ...

    def check_continues(self, *, tools: bool = False) -> None:
        """Raise ConfigError if the template can't continue a conversation after tokens that were sampled.

        `tools`: it must also accept the answers of tools.
        """
        ...


class TokenizerRenderer:
    """What all renderers do with their tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stop_token_ids)
        added = tokenizer.added_tokens_decoder.items()
        special = [token.content for i, token in added if token.special or i in self._stops]
        starts = [f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in special if len(text) > 1]
        self._starts = re.compile("|".join(starts) or "(?!)")  # first characters of what spells a special token

    def shorten(self, text: str, max_tokens: int) -> str:
        if len(text.encode("utf-8", "replace")) <= max_tokens:  # a token has at least a byte
            return text
        # Only so many characters are tokenized: of a megabyte it would take a second.
        length, most = len(text), _CHARACTERS_PER_TOKEN * max_tokens
        head, tail = (text, text) if length <= most else (text[: most // 2], text[-(most // 2) :])
        head_ids = self._encode(self._as_text(head))
        if length <= most and len(head_ids) <= max_tokens:
            return text
        tail_ids = self._encode(self._as_text(tail))
        half = max(0, max_tokens - len(self._encode(_NOTE.format(length)))) // 2
        # A character that is cut through is left out.
        head = self._tokenizer.decode(head_ids[:half]).rstrip("\ufffd")
        tail = self._tokenizer.decode(tail_ids[len(tail_ids) - half :]).lstrip("\ufffd")
        return f"{head}{_NOTE.format(length - len(head) - len(tail))}{tail}"

    def _as_text(self, value: Any) -> Any:
        """Return the strings in a JSON value with a cut in whatever spells a special token."""
        if isinstance(value, str):
            return self._starts.sub(rf"\g<0>{_CUT}", encodable(value))
        if isinstance(value, Mapping):
            return {key: self._as_text(each) for key, each in value.items()}
        return [self._as_text(each) for each in value] if isinstance(value, (list, tuple)) else value

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> Ints:
        """Return the tokens of a text, which is tokenized apart before and after a cut."""
        first, *others = text.split(_CUT)
        tokens = self._tokenizer.encode(first, add_special_tokens=add_special_tokens)
        for part in others:
            tokens += self._tokenizer.encode(part, add_special_tokens=False)
        return np.array(tokens, dtype=np.int64)


class PlainRenderer(TokenizerRenderer):
    """Contents as they are, one after another. An end-of-sequence token ends a turn. For models without a template."""

    def opening(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
        if tools:
            raise ConfigError("plain text has no room for tools; set task.template=chat", key="task.template")
        # A system prompt belongs to a template.
        texts = [message.content for message in messages if message.role != "system"]
        return self._encode(self._as_text("".join(texts)), add_special_tokens=True)

    def parse(self, sampled: Ints, context: Context = NO_CONTEXT) -> Message:
        return Message("assistant", self._tokenizer.decode(sampled, skip_special_tokens=True))

    def continuation(self, sampled: Ints, messages: Sequence[Message], context: Context = NO_CONTEXT) -> Ints:
        tokens = self._encode(self._as_text("".join(message.content for message in messages)))
        if int(sampled[-1]) in self._stops:
            return tokens
        return np.concatenate([np.array(self._stops[:1], dtype=np.int64), tokens])

    def check_continues(self, *, tools: bool = False) -> None:
        """Plain text continues after anything."""


class ChatRenderer(TokenizerRenderer):
    """The tokenizer's chat template.

    A continuation is what the template writes after an answer when more messages follow it, taken from a short
    conversation. That works for templates which write an answer's end alike whatever follows, see `check_continues`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError("the model has no chat template; set task.template=plain", key="task.template")
        super().__init__(tokenizer, stop_token_ids)

    def opening(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
        return self._encode(self._render(messages, tools, generates=True))

    def parse(self, sampled: Ints, context: Context = NO_CONTEXT) -> Message:
        return parse_answer(self._tokenizer.decode(sampled, skip_special_tokens=True))

    def continuation(self, sampled: Ints, messages: Sequence[Message], context: Context = NO_CONTEXT) -> Ints:
        tokens = self._encode(self._after_answer(*messages))
        return tokens[1:] if int(sampled[-1]) in self._stops else tokens

    def check_continues(self, *, tools: bool = False) -> None:
        end, fix = self._after_answer(generates=False), "use another model, or a task of one turn"
        if not (tokens := self._encode(end)).size or int(tokens[0]) not in self._stops:
            raise ConfigError(
                f"the chat template writes {end[:20]!r} after an answer, which is no stop token of the model; {fix}",
                key="task.template",
            )
        roles: tuple[Role, ...] = ("user", "tool")
        for role in roles:
            more = Message(role, "More", tool_call_id="call_0", name="tool")
            try:
                continued = self._after_answer(more)
            except ConfigError:
                if role == "tool" and not tools:
                    continue  # no environment can use them: that is refused when one does
                raise
            if not continued.startswith(end):
                raise ConfigError(
                    f"the chat template rewrites an answer before a {role} message; {fix}", key="task.template"
                )

    def _after_answer(self, *messages: Message, generates: bool = True) -> str:
        """Return what the template writes after an answer that these messages follow."""
        return self._render([*_BASE, *messages], (), generates=generates).partition(_ANSWER)[2]

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, generates: bool) -> str:
        plain = self._as_text([as_dict(message) for message in messages])
        try:
            text: str = self._tokenizer.apply_chat_template(
                plain, tools=self._as_text(tools) or None, add_generation_prompt=generates, tokenize=False
            )
        except TemplateError as error:  # Gemma's, for example, rejects system messages
            has_system = messages[0].role == "system"
            setting = "task.system_prompt=null" if has_system else "task.template=plain"
            raise ConfigError(
                f"the model's chat template rejects the messages ({' '.join(str(error).split())}); set {setting}",
                key=setting.partition("=")[0],
            ) from error
        return text


def parse_answer(text: str) -> Message:
    """Split an answer into its reasoning in think tags, its tool calls in tool_call tags, and the rest, its content.

    Reasoning stands at the start; its first tag may be the template's, its last one missing where the answer was cut
    off. A tool call is a JSON object with `name` and `arguments`, as many chat models write it (Hermes, Qwen).
    """
    before, closed, after = text.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    if opened or (closed and "<think>" not in before):
        reasoning, answer = before.lstrip().removeprefix("<think>").strip(), after.lstrip()
    else:
        reasoning, answer = None, text
    calls = tuple(_tool_call(i, match[1].strip()) for i, match in enumerate(_TOOL_CALL.finditer(answer)))
    content = _TOOL_CALL.sub("", answer).strip() if calls else answer
    return Message("assistant", content, reasoning, calls)


def _tool_call(number: int, raw: str) -> ToolCall:
    try:
        call = json.loads(raw)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        name, arguments = "", None
    return ToolCall(f"call_{number}", str(name), arguments if isinstance(arguments, dict) else None, raw)


def encodable(text: str) -> str:
    """Return the text without lone surrogates, which tokenizers refuse and JSON may hold."""
    return text.encode("utf-8", "replace").decode()


def as_dict(message: Message) -> dict[str, Any]:
    """Return a message in the form that chat templates expect, that of the OpenAI API."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        plain["reasoning_content"] = message.reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments or {}}}
            for call in message.tool_calls
        ]
    if message.role == "tool":
        plain |= {"tool_call_id": message.tool_call_id, "name": message.name}
    return plain
