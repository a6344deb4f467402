"""The dialects in which agents can ask: one file each, and what they share."""

from __future__ import annotations

from .base import Dialect
from .completions import ChatCompletions
from .messages import AnthropicMessages
from .responses import Responses


CHAT = ChatCompletions()
MESSAGES = AnthropicMessages()
RESPONSES = Responses()

DIALECTS: tuple[Dialect, ...] = (CHAT, MESSAGES, RESPONSES)
"""All of them. A route of agents is one of theirs, or the list of models."""
