"""What stands around the weights: tokenizer, template, generation config with the tokens that were trained to stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwentune.data.tokenizing.tokenizer import split_pattern
from qwentune.data.tokenizing.vocabulary import SPLIT_PATTERN
from qwentune.exporting.config_keys import kept_config, kept_part_config
from qwentune.facts.documents import LARGEST_TOKENIZER_BYTES, read_object
from qwentune.facts.generation_config import as_trained, end_token_ids, read_generation_config
from qwentune.facts.servers import response_template

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
# Transformers puts Qwen2's pattern over the one in tokenizer.json where these are named and no config.json says better.
CLASSES_WITH_QWEN2_PATTERN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
CLASS_WITHOUT_PATTERN = "PreTrainedTokenizerFast"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def copy_weights(source: Path, target: Path) -> None:
    """Copies the weights of a checkpoint, with their configuration and nothing else, into a folder."""
    for pattern in WEIGHT_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def keep_config(target: Path, base: Path) -> None:
    """Writes config.json with the base's keys: for its weights merged, or around what training has written."""
    path = target / "config.json"
    before, saved = _json(base / "config.json"), _json(path)
    is_part = bool(saved) and saved.get("model_type") != before.get("model_type")
    config = kept_part_config(before, saved) if is_part else kept_config(before, saved)
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_package(
    target: Path, base: Path, *, chat_template: str | None, stop_token_ids: Iterable[int], end_of_text_id: int
) -> None:
    """Adds tokenizer, chat template and generation config to the weights in `target`.

    The tokenizer's files are the base's, byte for byte but for the name of a class that would split texts otherwise,
    and for how `transformers serve` reads calls where it would not do so by itself. Generation stops on the tokens
    that were trained to end a turn, the base's own stop tokens besides.
    """
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, target / name)
    _name_a_class_that_keeps_the_pattern(target)
    if chat_template is not None:
        (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    generation = as_trained(read_generation_config(base), stop_token_ids, end_of_text_id)
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if (target / "config.json").exists():
        # Servers that read no generation config take the stop token from here.
        config = _json(target / "config.json")
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["use_cache"] = True  # off only while training
        config["eos_token_id"] = next(iter(end_token_ids(generation)), config.get("eos_token_id"))
        _say_how_calls_are_read(target, chat_template or "", config)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stop_token_ids(report: Mapping[str, Any], control_ids: Mapping[str, int]) -> list[int]:
    """The ids of the tokens that ended trained turns, the most frequent first."""
    return [control_ids[name] for name in report["stop_tokens"]]


def serving_flags(report: Mapping[str, Any]) -> dict[str, Any]:
    """The template arguments under which the tuned model was trained, and with which it must be served."""
    template = report["template"]
    if template is None:
        return {}
    flags = dict(template["args"])
    mode = main_mode(report)
    if mode != "default" and mode != template["default_mode"]:
        flags["enable_thinking"] = mode == "thinking"
    return flags


def own_limits(report: Mapping[str, Any]) -> str:
    """What is to be said of rows that bound their media otherwise than the run; empty where none does."""
    media: Mapping[str, Mapping[str, Any]] = report.get("media", {})
    found = [
        f"{one['rows_with_own_limits']} with {kind}" for kind, one in media.items() if one.get("rows_with_own_limits")
    ]
    if not found:
        return ""
    return (
        f"rows that were trained with their own bounds of pixels or frames: {', '.join(found)}. No file or option of a "
        "server says them: a request like theirs must carry its own (vLLM: mm_processor_kwargs, media_io_kwargs)"
    )


def main_mode(report: Mapping[str, Any]) -> str:
    """The mode that most turns were trained in."""
    modes: Mapping[str, int] = report["modes"]
    return max(modes, key=lambda mode: modes[mode]) if modes else "default"


def model_card(*, name: str, base: str, tuning: str, report: Mapping[str, Any], step: int, loss: float | None) -> str:
    """A README for the tuned model: what it is, what it was trained on, how to serve it; no text of any row.

    `loss` is the last one, None where its record was lost.
    """
    flags = serving_flags(report)
    modes = ", ".join(f"{count} {mode}" for mode, count in report["modes"].items()) or "texts"
    stops = ", ".join(f"`{token}`" for token in report["stop_tokens"]) or "`<|endoftext|>`"
    last_loss = "" if loss is None else f"; last loss {loss:.4f}"
    lines = [
        *("---", f"base_model: {base}", "library_name: transformers", "tags: [qwentune]", "---", "", f"# {name}", ""),
        f"{base}, tuned ({tuning}) on {report['train_examples']} examples",
        f"with {report['trained_tokens']} trained tokens ({modes}) for {step} steps{last_loss}.",
        "",
        f"Turns end with {stops}; `generation_config.json` stops there.",
    ]
    if flags:
        lines += ["", f"Serve it with `chat_template_kwargs` `{json.dumps(flags)}`: that is how it was trained."]
    if own := own_limits(report):
        lines += ["", f"{own[0].upper()}{own[1:]}."]
    return "\n".join(lines) + "\n"


def _name_a_class_that_keeps_the_pattern(folder: Path) -> None:
    config = _json(folder / "tokenizer_config.json")
    is_qwen2 = split_pattern(_json(folder / "tokenizer.json")) == SPLIT_PATTERN
    if config.get("tokenizer_class") in CLASSES_WITH_QWEN2_PATTERN and not is_qwen2:
        config["tokenizer_class"] = CLASS_WITHOUT_PATTERN
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _say_how_calls_are_read(folder: Path, template: str, config: Mapping[str, Any]) -> None:
    wanted = response_template(template, str(config.get("model_type")))
    if wanted is not None:
        given = _json(folder / "tokenizer_config.json")
        text = json.dumps({"response_template": wanted, **given}, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    return read_object(path, optional=True, largest_bytes=LARGEST_TOKENIZER_BYTES)
