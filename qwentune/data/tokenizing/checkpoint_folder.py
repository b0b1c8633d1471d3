"""The folder that holds a checkpoint's config, tokenizer and template: local, built in, or a hub snapshot."""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

from qwentune.data.cache import cache_folder, writable_cache
from qwentune.data.tokenizing.vocabulary import write_tokenizer
from qwentune.durable import mark, settle
from qwentune.errors import Problem, UsageError, machine_error
from qwentune.facts.models import ModelSpec, config_of, model_spec

BUILTIN = "builtin:"
DESCRIPTION_FILES = ["*.json", "*.jinja", "merges.txt"]
WEIGHT_FILES = [*DESCRIPTION_FILES, "*.safetensors"]


def checkpoint_folder(model: str, revision: str | None = None, *, weights: bool = False, fetches: bool = True) -> Path:
    """The local folder of a checkpoint; its weights are fetched only where they are asked for.

    Raises UsageError where the model is neither a folder, nor built in, nor to be had from the hub, or, where nothing
    is to be fetched, from its cache.
    """
    if model.startswith(BUILTIN):
        return _builtin_folder(model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    spec = model_spec(model)
    try:
        patterns = WEIGHT_FILES if weights else DESCRIPTION_FILES
        return Path(
            snapshot_download(spec.id, revision=revision, allow_patterns=patterns, local_files_only=not fetches)
        )
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if (refused := machine_error(error)) is not None:  # of the hub's cache, a folder of this machine
            raise refused from None
        reason = str(error).splitlines()[0]
        fix = "Check the connection, or download the checkpoint and give its folder as `model`."
        raise UsageError(Problem(spec.id, f"cannot be fetched from the hub: {reason}", fix)) from None


def _builtin_folder(model: str) -> Path:
    """A checkpoint without weights, written once: Qwen's real vocabulary around a model small enough for a CPU."""
    spec = model_spec(model)
    folder = cache_folder() / "builtin" / model.removeprefix(BUILTIN)
    if not folder.exists():
        staging = Path(tempfile.mkdtemp(dir=writable_cache("builtin")))
        mark(staging)
        write_tokenizer(staging, "qwen3")
        (staging / "chat_template.jinja").write_text(_qwen3_chat_template(), encoding="utf-8")
        (staging / "config.json").write_text(json.dumps(_config(spec), indent=2) + "\n")
        settle(staging, folder)
    return folder


def _qwen3_chat_template() -> str:
    # TRL ships Qwen's own template; `find_spec` finds the file without importing TRL and, with it, torch.
    package = find_spec("trl")
    assert package is not None
    assert package.submodule_search_locations
    return (Path(package.submodule_search_locations[0]) / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


def _config(spec: ModelSpec) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        **config_of(spec),
        "dtype": "float32",
        "eos_token_id": 151645,
        "bos_token_id": None,
        "pad_token_id": 151643,
    }
