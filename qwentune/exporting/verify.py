"""What was exported, read back by transformers: its weights, configuration, template and stop tokens are the run's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwentune.data.dataset import prepared
from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
from qwentune.errors import DoesNotFitError, Problem, UserError, counted
from qwentune.exporting.config_keys import DTYPE_KEYS, part_of_config
from qwentune.exporting.finished import FinishedRun
from qwentune.exporting.media_prompts import media_prompts
from qwentune.exporting.merge import largest_logit_difference, load_tuned
from qwentune.exporting.package import stop_token_ids
from qwentune.exporting.processors import is_whole
from qwentune.facts.adapter_config import ADAPTER_CONFIG
from qwentune.facts.documents import read_object
from qwentune.facts.generation_config import end_token_ids, read_generation_config
from qwentune.facts.present import free_host_bytes
from qwentune.facts.weight_files import read_weights
from qwentune.model.adapters import load_adapters
from qwentune.model.loading import load_model, silence_loading, weights_folder

TEXTS = ("Hello", "1 + 1 =", "你好，世界", "def f(x):\n    return")
NUM_ROWS, MOST_TOKENS = 4, 512  # of the run's own data
# Shares of the largest logit.
TOLERANCE_FP32 = 1e-4
TOLERANCE_16_BIT = 0.05  # a merged weight is rounded once more than an adapter beside it
WRITTEN_ANEW = {"eos_token_id", "use_cache", "transformers_version", *DTYPE_KEYS}
REPORT = "Nothing was exported; please report it."


def verify(run: FinishedRun, exported: Path) -> Iterator[str]:
    """Sentences on what was found equal, one by one.

    Raises UserError where logits differ by more than rounding explains or are no numbers, and where a file says
    something else than the run's or the base's; ResumeError where a tensor is missing, another or not the model's.
    """
    silence_loading()
    base = weights_folder(run.model, run.revision) if run.has_adapter else run.trained
    is_adapter = (exported / ADAPTER_CONFIG).exists()
    if problems := [*_odd_files(run, exported, is_adapter=is_adapter)]:
        raise UserError(problems, REPORT)
    _refuse_full_memory([base, base if is_adapter else exported])
    reference = load_tuned(base, run.trained if run.has_adapter else None)
    candidate = load_tuned(base if is_adapter else exported, exported if is_adapter else None)
    texts = [{"input_ids": torch.tensor([ids])} for ids in run.tokenizer.encode(TEXTS)]
    rows, media = _own_rows(run), media_prompts(run, base, reference.config.model_type)
    if candidate.config.model_type != reference.config.model_type:
        media = {}  # one of them reads texts alone
    prompts = [*texts, *rows, *media.values()]
    difference, scale = largest_logit_difference(reference, candidate, prompts)
    shown = ", ".join([f"{len(texts)} texts", *([counted(len(rows), "row{|s} of the run")] if rows else ()), *media])
    yield f"verified: largest difference of logits {difference:.1e} of {scale:.1f} on {shown}"
    allowed = TOLERANCE_FP32 if next(candidate.parameters()).dtype.itemsize == 4 else TOLERANCE_16_BIT
    if not difference <= allowed * scale:
        what = f"its logits differ from the run's by {difference:.1e}, more than {allowed * scale:.1e}"
        raise UserError(Problem(str(exported), what, REPORT))
    if run.four_bit:
        del reference
        distance, scale = largest_logit_difference(_in_four_bits(run, base), candidate, prompts)
        yield (
            f"the run itself, whose base stood in 4 bits, differs from it by up to {distance:.1e} of {scale:.1f}: the "
            "rounding of the base, without which it is exported"
        )


def _refuse_full_memory(folders: Sequence[Path]) -> None:
    """Raises DoesNotFitError where the host has no room for all these weights as they are stored."""
    needed = sum(tensor.num_bytes for folder in folders for tensor in read_weights(folder).values())
    if needed > (free := free_host_bytes()):
        what = f"two models of together {needed / 1e9:,.1f} GB are compared in memory; {free / 1e9:,.1f} GB are free"
        fix = "Leave it out, or verify on a machine with more memory."
        raise DoesNotFitError(Problem("--verify", what, fix), "Nothing was exported.")


def _own_rows(run: FinishedRun) -> list[dict[str, torch.Tensor]]:
    """The first texts of the run's data, where they stand in the cache: keywords of a forward."""
    tokenizer = replace(run.tokenizer, folder=str(run.checkpoint))
    dataset = prepared(run.data, tokenizer, run.template, run.seed)
    if dataset is None:
        return []
    found: list[dict[str, torch.Tensor]] = []
    for i in dataset.first_epoch[: 4 * NUM_ROWS].tolist():
        ids = torch.from_numpy(dataset.examples.ids(i)[:MOST_TOKENS].astype("int64"))[None]
        if len(found) < NUM_ROWS and not (ids < 0).any():
            found.append({"input_ids": ids})
    return found


def _in_four_bits(run: FinishedRun, base: Path) -> Any:
    on_gpu = torch.cuda.is_available()
    dtype = "bf16" if on_gpu else "fp32"
    device = torch.device("cuda") if on_gpu else None
    has_media = is_whole(run.trained)
    model = load_model(base, dtype=dtype, four_bit=True, device=device, has_media=has_media)
    return load_adapters(model, run.trained, dtype).eval()


def _odd_files(run: FinishedRun, exported: Path, *, is_adapter: bool) -> Iterator[Problem]:
    """What is written around the weights otherwise than the run and its base have it."""
    template = run.tokenizer.chat_template
    file = exported / "chat_template.jinja"
    if template is not None and (not file.is_file() or file.read_text(encoding="utf-8") != template):
        yield Problem(str(file), "is not the template that was trained")
    stops = {*stop_token_ids(run.report, run.tokenizer.control_ids)}
    if lost := sorted(stops - {*end_token_ids(read_generation_config(exported))}):
        yield Problem(f"{exported / 'generation_config.json'}: eos_token_id", f"lacks {lost}, which end trained turns")
    if not is_adapter:
        described = checkpoint_folder(run.model, run.revision)
        config, base = (read_object(folder / "config.json") for folder in (exported, described))
        if config.get("model_type") != base.get("model_type"):
            tied = {key: base[key] for key in ("tie_word_embeddings",) if key in base}  # the whole's count for its part
            base = part_of_config(base, config.get("model_type")) | tied
        for key, value in _differences(base, config):
            yield Problem(f"{exported / 'config.json'}: {key}", f"is {value!r}, and the base has something else")


def _differences(base: Mapping[str, Any], config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of the base whose values are others in a configuration, but for those that an export writes anew."""
    for key, value in base.items():
        mine = config.get(key)
        if isinstance(value, dict) and isinstance(mine, dict):
            yield from _differences(value, mine, f"{prefix}{key}.")
        elif key not in WRITTEN_ANEW and mine != value:
            yield f"{prefix}{key}", mine
