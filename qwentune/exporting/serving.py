"""The commands that serve an exported folder as it was trained, each for a server that can take it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwentune.data.tokenizing.checkpoint_folder import BUILTIN, checkpoint_folder
from qwentune.exporting.finished import FinishedRun
from qwentune.exporting.omni import is_omni
from qwentune.exporting.package import main_mode, serving_flags
from qwentune.facts.adapter_config import read_adapter_config
from qwentune.facts.documents import read_object
from qwentune.facts.servers import SGLANG, VLLM, CallForm, Server, call_form
from qwentune.facts.weight_files import ADAPTER_WEIGHTS

PORTS = {"vLLM": 8000, "SGLang": 30000}


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """How this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Artefact:
    """What is served: a folder with a whole model, or with adapters for `base` at `revision`.

    `unservable` says why no server takes the adapters; `vllm` are options of vLLM's for media.
    """

    folder: Path
    name: str
    base: str | None
    rank: int
    unservable: str
    context: int | None
    template_args: dict[str, Any]
    reasons: bool
    calls: CallForm | None
    vllm: Mapping[str, Any] = field(default_factory=dict[str, Any])
    revision: str | None = None


def artefact(run: FinishedRun, folder: Path, vllm: Mapping[str, Any]) -> Artefact:
    """What was exported of a run into a folder."""
    is_adapter = (folder / ADAPTER_WEIGHTS).exists()
    config = read_adapter_config(folder) if is_adapter else {}
    template = run.template.text if run.template is not None else ""
    configured = checkpoint_folder(run.model, run.revision) if is_adapter else folder
    return Artefact(
        folder=folder,
        name=run.folder.resolve().name,
        base=run.model if is_adapter else None,
        rank=max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()]),
        unservable=_unservable(config, configured, run.model),
        context=_context(configured),
        template_args=serving_flags(run.report),
        reasons=_reasons(run),
        calls=call_form(template),
        vllm=vllm,
        revision=run.revision if is_adapter else None,
    )


def commands(served: Artefact, address: Address | None = None) -> dict[str, str]:
    """The command of each server that takes it, by the server's name; none where none does.

    It listens at `address`, else where the server does by itself.
    """
    if served.unservable:
        return {}
    found = {"vLLM": _vllm(served), "SGLang": _sglang(served)}
    if served.base is None:
        found["transformers"] = _transformers(served)
    there = f" --host {shlex.quote(address.host)} --port {address.port}" if address else ""
    return {name: f"{command}{there}" for name, command in found.items() if command is not None}


def request(served: Artefact, server: str, message: str, address: Address | None = None) -> str:
    """A command that asks a server that was started by its command."""
    name = str(served.folder) if server == "transformers" else served.name  # which knows a model by its folder alone
    body = {"model": name, "messages": [{"role": "user", "content": message}], "temperature": 0}
    where = f"{(address or Address('127.0.0.1', PORTS.get(server, 8000))).url}/v1/chat/completions"
    return shlex.join(["curl", where, "-H", "Content-Type: application/json", "-d", json.dumps(body)])


def _vllm(served: Artefact) -> str | None:
    if served.base is None:
        words = ["vllm", "serve", str(served.folder), "--served-model-name", served.name]
    else:
        allowed = next((rank for rank in VLLM.ranks if rank >= served.rank), None)
        if allowed is None:
            return None
        words = ["vllm", "serve", served.base, "--enable-lora", "--max-lora-rank", str(allowed)]
        words += ["--lora-modules", f"{served.name}={served.folder}", "--generation-config", str(served.folder)]
        words += ["--revision", served.revision] if served.revision else []
        if (served.folder / "chat_template.jinja").exists():
            words += ["--chat-template", str(served.folder / "chat_template.jinja")]
    if served.context is not None:
        words += ["--max-model-len", str(served.context)]
    if served.calls is not None:
        words.append("--enable-auto-tool-choice")
    words += _parsers(served, VLLM)
    options = {"default-chat-template-kwargs": served.template_args, **served.vllm}
    for name, value in options.items():
        words += [f"--{name}", json.dumps(value)] if value else []
    return shlex.join(words)


def _sglang(served: Artefact) -> str:
    words = ["sglang", "serve", "--model-path", served.base or str(served.folder)]
    if served.base is None:
        words += ["--served-model-name", served.name]
    else:
        words += ["--enable-lora", "--max-lora-rank", str(served.rank)]
        words += ["--lora-paths", f"{served.name}={served.folder}"]
        words += ["--revision", served.revision] if served.revision else []
        if (served.folder / "chat_template.jinja").exists():
            words += ["--chat-template", str(served.folder / "chat_template.jinja")]
    if served.context is not None:
        words += ["--context-length", str(served.context)]
    words += _parsers(served, SGLANG)
    if served.template_args:
        words += ["--default-chat-template-kwargs", json.dumps(served.template_args)]
    return shlex.join(words)


def _transformers(served: Artefact) -> str:
    words = ["transformers", "serve", str(served.folder)]
    if served.template_args:
        words += ["--chat-template-kwargs", json.dumps(served.template_args)]
    return shlex.join(words)


def _parsers(served: Artefact, server: Server) -> list[str]:
    """The options that have reasoning and calls told from the answer, as the model was taught to write them."""
    words: list[str] = []
    if served.calls is not None:
        words += ["--tool-call-parser", server.tool_call_parsers[served.calls]]
    if served.reasons:
        words += ["--reasoning-parser", server.reasoning_parser]
    return words


def _reasons(run: FinishedRun) -> bool:
    """Whether answers begin with reasoning: in the mode of most turns, or by a template that knows no other."""
    mode = main_mode(run.report)
    knows_no_other = mode == "default" and run.template is not None and run.template.thinks_by_default
    return mode == "thinking" or (knows_no_other and run.report.get("turns_with_reasoning", 0) > 0)


def _unservable(config: Mapping[str, Any], base: Path, model: str = "") -> str:
    """Why servers do not take an adapter with this configuration on this base; empty where they do.

    Source: `_validate_features` of vllm/lora/peft_helper.py; vllm-project/vllm#36501 for trained rows.
    """
    if config and model.startswith(BUILTIN):
        return f"its base is {model}, which servers do not know"
    if config.get("trainable_token_indices"):
        return "it has trained rows of the embedding and the head, which vLLM and SGLang do not load"
    if config.get("use_dora"):
        return "it is DoRA, which vLLM and SGLang do not load"
    if config.get("target_parameters"):
        return "it adapts experts by PEFT's names, which vLLM and SGLang do not know"
    if set(config.get("target_modules") or ()) & {"lm_head", "embed_tokens"}:
        return "it adapts the head or the embedding, which servers load for few models"
    if config and is_omni(base):
        return "it is for the thinker of an Omni model, which servers load as a part of the whole"
    return ""


def _context(folder: Path) -> int | None:
    """The tokens that a model's configuration allows."""
    config = read_object(folder / "config.json", optional=True)
    for part in (config, config.get("text_config"), config.get("thinker_config", {}).get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("max_position_embeddings"), int):
            return part["max_position_embeddings"]
    return None
