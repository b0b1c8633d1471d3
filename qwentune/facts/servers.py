"""What the servers of the day take: the names of their parsers, the ranks of adapters that they allow.

Read out of the servers' own published packages, vLLM 0.33.0 and SGLang 0.5.23; `tests/test_servers.py` reads them anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

CallForm = Literal["json", "xml"]  # of a call between <tool_call> and its end


@dataclass(frozen=True)
class Server:
    """One server: its parser of reasoning, and of calls by their form.

    `ranks` are the largest ranks that it lets an operator allow, from which the smallest that suffices is taken; none
    where any may be named.
    """

    name: str
    reasoning_parser: str
    tool_call_parsers: dict[CallForm, str]
    ranks: tuple[int, ...] = ()


VLLM = Server(
    "vLLM",
    "qwen3",  # vllm/reasoning/__init__.py
    {"json": "hermes", "xml": "qwen3_xml"},  # vllm/tool_parsers/__init__.py
    (1, 8, 16, 32, 64, 128, 256, 320, 512),  # MaxLoRARanks of vllm/config/lora.py
)
SGLANG = Server(
    "SGLang",
    "qwen3",  # DetectorMap of sglang/srt/parser/reasoning_parser.py
    {"json": "qwen25", "xml": "qwen3_coder"},  # sglang/srt/function_call/function_call_parser.py
)


def call_form(template: str) -> CallForm | None:
    """The form in which a chat template has calls written; None where it has none."""
    if "<function=" in template:
        return "xml"
    return "json" if "<tool_call>" in template else None


# How `transformers serve` reads answers by itself: calls in tags of these types alone, of other Qwens calls in JSON; it
# fails at what it cannot read (transformers/cli/serving/utils.py, 5.24). It takes another reading from the key
# `response_template` of tokenizer_config.json, in the form of transformers/utils/chat_parsing.
READ_IN_TAGS = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
IN_TAGS: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}


def response_template(template: str, model_type: str) -> dict[str, Any] | None:
    """What `transformers serve` must be told of how a model's answers are read; None where it does so by itself."""
    return IN_TAGS if call_form(template) == "xml" and model_type not in READ_IN_TAGS else None
