"""What the servers of the day take: the names of their parsers, the ranks of adapters that they allow.

Read out of the servers' own published packages, vLLM 0.33.0 and SGLang 0.5.23; `tests/test_servers.py` reads them anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
