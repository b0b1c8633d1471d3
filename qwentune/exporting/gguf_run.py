"""A finished run as a GGUF file: its adapter merged on the way, its tokenizer, template and stop tokens inside."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qwentune.errors import Problem, UsageError
from qwentune.exporting.finished import FinishedRun
from qwentune.exporting.folder import refuse_full_disk
from qwentune.exporting.gguf_file import write_gguf
from qwentune.exporting.gguf_tensors import GgufTensor
from qwentune.exporting.merge import tuned_tensors
from qwentune.exporting.package import stop_token_ids
from qwentune.exporting.tensors import ModelTensor
from qwentune.facts.documents import read_object
from qwentune.facts.media import FAMILIES
from qwentune.facts.models import model_spec
from qwentune.facts.towers import LOADED_ALONE
from qwentune.facts.weight_files import read_weights
from qwentune.model.loading import weights_folder

SMALLER = "Q4_K_M"
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}  # of a weight; blocks of 32 have a scale of two bytes


@dataclass(frozen=True)
class WrittenGguf:
    """A GGUF file, its tensors, and whether a tower of the model was left out."""

    path: Path
    tensors: list[GgufTensor]
    without_tower: bool


def write_run_gguf(run: FinishedRun, kind: str, target: Path) -> WrittenGguf:
    """Writes the run's decoder and a Modelfile into the folder `target`.

    Raises UsageError for a model that llama.cpp does not serve as a text model; ResumeError as a merge.
    """
    folder = weights_folder(run.model, run.revision) if run.has_adapter else run.trained
    config: dict[str, Any] = read_object(folder / "config.json")
    model_type = config.get("model_type")
    if model_type in FAMILIES and model_type not in LOADED_ALONE:
        what = f"{model_type} sees or hears, and llama.cpp takes that in files of their own"
        raise UsageError(Problem("--gguf", what, "Export with --merge, and convert that folder with llama.cpp."))
    if run.has_adapter:
        tensors = tuned_tensors(folder, run.trained)
    else:
        tensors = {name: ModelTensor(tensor) for name, tensor in read_weights(folder).items()}
    refuse_full_disk([folder], target, "-o", lambda tensor: prod(tensor.shape) * BYTES[kind])
    path = target / f"{run.folder.resolve().name}-{kind.upper()}.gguf"
    written = write_gguf(
        path,
        kind,
        tensors,
        spec=model_spec(str(folder)),
        config={**config, **(config.get("text_config") or {})},
        tokenizer=run.tokenizer,
        chat_template=run.tokenizer.chat_template,
        stops=stop_token_ids(run.report, run.tokenizer.control_ids),
    )
    (target / "Modelfile").write_text(f"FROM ./{path.name}\n", encoding="utf-8")
    return WrittenGguf(path, written, without_tower=model_type in LOADED_ALONE)


def gguf_commands(path: Path, context: int, template_args: dict[str, Any], name: str) -> dict[str, str]:
    """What is done with a GGUF file, by what it is for: the command."""
    serve = ["llama-server", "-m", str(path), "--jinja", "-c", str(context)]
    serve += ["--chat-template-kwargs", json.dumps(template_args)] if template_args else []
    found = {"serve it as it was trained": shlex.join(serve)}
    if not path.stem.endswith("-Q8_0"):  # a smaller one is made of the exact numbers
        smaller = path.with_name(f"{path.stem.rpartition('-')[0]}-{SMALLER}.gguf")
        found["make it smaller"] = shlex.join(["llama-quantize", str(path), str(smaller), SMALLER])
    found["import it into Ollama"] = shlex.join(["ollama", "create", name, "-f", str(path.with_name("Modelfile"))])
    return found
