"""The commands that export prints: each server's own options, and none where it cannot take what was exported."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.exporting.serving import Artefact, _reasons, _unservable, commands, request
from qwentune.facts.servers import SGLANG, VLLM, call_form

MERGED = Artefact(Path("out"), "mine", None, 0, "", 32768, {}, False, "json")
ADAPTER = replace(MERGED, base="Qwen/Qwen3-8B", rank=32)
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}
WHERE = {  # where a server declares its options
    "vLLM": ("vllm/entrypoints/common/cli_args.py", "vllm/engine/arg_utils.py", "vllm/config/structured_outputs.py"),
    "SGLang": ("sglang/srt/arg_groups/field_order.py", "sglang/srt/server_args.py"),
}


def options(command: str) -> dict[str, str]:
    """The options of a command, each with the word after it."""
    words = shlex.split(command)
    return {word: after for word, after in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def test_an_adapter_is_served_beside_its_base_with_its_rank_allowed(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = commands(replace(ADAPTER, folder=tmp_path))
    assert found.keys() == {"vLLM", "SGLang"}  # transformers serves no adapter
    assert shlex.split(found["vLLM"])[:3] == ["vllm", "serve", "Qwen/Qwen3-8B"]
    vllm = options(found["vLLM"])
    assert vllm["--lora-modules"] == f"mine={tmp_path}"
    assert vllm["--max-lora-rank"] == "32"
    assert vllm["--generation-config"] == str(tmp_path)  # the tokens that were trained to stop
    assert vllm["--chat-template"] == str(tmp_path / "chat_template.jinja")
    assert options(found["SGLang"])["--lora-paths"] == f"mine={tmp_path}"


@pytest.mark.parametrize(
    ("rank", "allowed"), [(4, "8"), (16, "16"), (33, "64"), (300, "320"), (512, "512"), (600, None)]
)
def test_ranks_are_those_that_vllm_lets_be_allowed(rank: int, allowed: str | None) -> None:
    found = commands(replace(ADAPTER, rank=rank))
    assert (options(found["vLLM"])["--max-lora-rank"] if "vLLM" in found else None) == allowed
    assert options(found["SGLang"])["--max-lora-rank"] == str(rank)


def test_a_whole_model_is_the_folder_itself() -> None:
    found = commands(MERGED)
    assert shlex.split(found["vLLM"])[:3] == ["vllm", "serve", "out"]
    assert options(found["SGLang"])["--model-path"] == "out"
    assert shlex.split(found["transformers"]) == ["transformers", "serve", "out"]
    assert not any("lora" in command for command in found.values())


def test_reasoning_calls_and_template_arguments_are_as_trained() -> None:
    quiet = commands(replace(MERGED, calls=None))
    assert not any("parser" in command or "tool" in command for command in quiet.values())
    found = commands(replace(MERGED, reasons=True, calls="xml", template_args={"enable_thinking": True}))
    for server, facts in (("vLLM", VLLM), ("SGLang", SGLANG)):
        given = options(found[server])
        assert given["--reasoning-parser"] == facts.reasoning_parser
        assert given["--tool-call-parser"] == facts.tool_call_parsers["xml"]
        assert json.loads(given["--default-chat-template-kwargs"]) == {"enable_thinking": True}
    assert "--enable-auto-tool-choice" in options(found["vLLM"])
    assert json.loads(options(found["transformers"])["--chat-template-kwargs"]) == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"trainable_token_indices": {"embed_tokens": [151645]}}, "rows of the embedding"),
        ({"use_dora": True}, "DoRA"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "experts"),
        ({"target_modules": ["q_proj", "lm_head"]}, "head"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": None, "use_dora": False}, ""),
    ],
)
def test_an_adapter_that_no_server_takes_has_no_command(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert "builtin:tiny-qwen3" in _unservable(config, tmp_path, "builtin:tiny-qwen3")
    why = _unservable(config, tmp_path)
    assert words in why
    assert bool(commands(replace(ADAPTER, unservable=why))) == (not words)


def test_adapters_stand_on_the_revision_that_they_were_trained_on() -> None:
    for command in commands(replace(ADAPTER, revision="v1.0")).values():
        assert options(command)["--revision"] == "v1.0"
    assert not any("--revision" in command for command in commands(ADAPTER).values())


@pytest.mark.parametrize(
    ("mode", "num_reasoning", "template", "reasons"),
    [
        ("thinking", 2, None, True),
        ("non_thinking", 0, None, False),
        ("default", 2, "thinking_only.jinja", True),
        ("default", 0, "thinking_only.jinja", False),
        ("default", 0, None, False),
    ],
)
def test_a_template_without_a_switch_reasons_by_itself(
    mode: str, num_reasoning: int, template: str | None, reasons: bool
) -> None:
    text = "" if template is None else (Path(__file__).parent / "templates" / template).read_text()
    run: Any = SimpleNamespace(
        template=ChatTemplate(text, {}, {}) if text else None,
        report={"modes": {mode: 3}, "turns_with_reasoning": num_reasoning},
    )
    assert _reasons(run) == reasons


def test_a_request_is_one_line_that_a_shell_reads_as_it_is_meant() -> None:
    *_, body = shlex.split(request(MERGED, "vLLM", "It's “here”\n?"))
    assert json.loads(body)["messages"] == [{"role": "user", "content": "It's “here”\n?"}]


def test_the_form_of_calls_is_read_off_the_template() -> None:
    assert call_form("<tool_call>\n<function=") == "xml"
    assert call_form('<tool_call>\n{"name": ') == "json"
    assert call_form("{{ messages }}") is None


@pytest.mark.soak
def test_options_and_parsers_are_those_of_the_published_servers(tmp_path: Path) -> None:
    """Downloads the packages (0.4 GB) and reads their sources."""
    wanted = [f"{name}=={version}" for name, version in VERSIONS.items()]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, *wanted], check=True)
    sources = {
        server: zipfile.ZipFile(next(tmp_path.glob(f"{name}-*.whl")))
        for name, server in zip(VERSIONS, WHERE, strict=True)
    }

    def text(server: str, *paths: str) -> str:
        return "\n".join(sources[server].read(path).decode() for path in paths)

    kinds = (True, False), ("json", "xml", None), (MERGED, replace(ADAPTER, revision="v1.0"))
    for reasons, calls, one in product(*kinds):
        media = {"mm-processor-kwargs": {"a": 1}, "media-io-kwargs": {"a": 1}}
        each = replace(one, reasons=reasons, calls=calls, template_args={"a": 1}, vllm=media)
        for server in WHERE:
            declared = text(server, *WHERE[server])
            for option in options(commands(each)[server]):
                name = option.removeprefix("--")
                assert name in declared or name.replace("-", "_") in declared, (server, option)

    parsers = text("vLLM", "vllm/tool_parsers/__init__.py")
    assert all(f'"{name}": (' in parsers for name in VLLM.tool_call_parsers.values())
    assert f'"{VLLM.reasoning_parser}": (' in text("vLLM", "vllm/reasoning/__init__.py")
    tree = ast.parse(text("vLLM", "vllm/config/lora.py"))
    (ranks,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MaxLoRARanks"
    )
    assert isinstance(ranks, ast.Subscript)
    assert ast.literal_eval(ranks.slice) == VLLM.ranks
    detectors = text("SGLang", "sglang/srt/function_call/function_call_parser.py")
    assert all(f'"{name}": ' in detectors for name in SGLANG.tool_call_parsers.values())
    assert f'"{SGLANG.reasoning_parser}": ' in text("SGLang", "sglang/srt/parser/reasoning_parser.py")
