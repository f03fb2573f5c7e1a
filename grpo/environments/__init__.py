"""Episodes of several turns: environments speak in messages, renderers turn these into tokens and back.

from grpo.environments import Environment, Message, Opening, Reply, ToolCall
"""

from grpo.environments.base import Environment, Message, Opening, Reply, ToolCall

__all__ = ["Environment", "Message", "Opening", "Reply", "ToolCall"]
