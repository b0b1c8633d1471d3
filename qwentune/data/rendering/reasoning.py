"""Reasoning apart from the answer, in a form that the template carries."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from qwentune.data.sample import Message, RowError
from qwentune.data.templates.chat_template import inline_reasoning

CLOSING_THINK_LINE = re.compile(r"(?s)(?:(.*?)\n)?</think>(?:\n(.*))?")


def with_reasoning_apart(message: Message) -> Message:
    """The message with inline reasoning moved out of its content, where the content begins with it."""
    if message.role != "assistant":
        return message
    if message.reasoning is not None:
        return message if message.reasoning.strip() else replace(message, reasoning="")
    content = message.content
    if content.lstrip().startswith("<think>") and "</think>" in content:
        reasoning, answer = content.lstrip().removeprefix("<think>").split("</think>", 1)
    elif "<think>" not in content and (match := CLOSING_THINK_LINE.fullmatch(content)):
        # A raw completion of a model whose prompt opens the block: only the closing tag, on a line of its own.
        reasoning, answer = match[1] or "", match[2] or ""
    else:
        return message
    reasoning = reasoning.strip("\n")
    return replace(message, reasoning=reasoning if reasoning.strip() else "", content=answer.lstrip("\n"))


def has_stray_tag(message: Message) -> bool:
    """Whether an answer without reasoning of its own holds a think tag that may be meant to set reasoning apart."""
    if message.role != "assistant" or (message.reasoning or "").strip():
        return False
    return "</think>" in message.content or message.content.lstrip().startswith("<think>")


def with_uncarried_reasoning(
    message: Message, policy: Literal["refuse", "drop", "inline"], where: str, cause: str
) -> Message:
    """The message with reasoning that this run cannot carry dropped, moved inline, or refused with RowError."""
    if message.role != "assistant" or not (message.reasoning or "").strip():
        return message
    if policy == "drop":
        return replace(message, reasoning=None)
    if policy == "inline":
        return replace(message, reasoning=None, content=inline_reasoning(message.reasoning or "", message.content))
    raise RowError(
        f"{where} has reasoning, but {cause}",
        "Set data.unsupported_reasoning to drop (train without it) or inline (train it as text).",
    )
