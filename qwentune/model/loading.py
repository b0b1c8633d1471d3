"""Weights into memory: the base in the dtype of the plan, or in 4 bits; every key accounted for."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qwentune.data.tokenizing.checkpoint_folder import BUILTIN, checkpoint_folder
from qwentune.durable import replace_file
from qwentune.errors import Problem, ResumeError, UsageError
from qwentune.facts.adapter_config import ADAPTER_CONFIG
from qwentune.facts.documents import MEND
from qwentune.facts.media import FAMILIES
from qwentune.facts.towers import PROJECTOR, TOWERS
from qwentune.facts.weight_files import StoredTensor, read_weights
from qwentune.model.senses import attention_of, network_class, network_config, odd_tower, take_media
from qwentune.model.sharded import no_warm_up, sharding

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUILTIN_SEED = 20250428
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
NOT_IN_4_BITS = ["lm_head", *(f"model.{name}" for name in (*TOWERS, PROJECTOR))]
NUM_NAMED = 5  # tensors of a kind of fault
OTHERS = "These weights are not the model's."


def weights_folder(model: str, revision: str | None = None) -> Path:
    """The folder with a base model's weights; a built-in model's random ones are written once."""
    folder = checkpoint_folder(model, revision, weights=True)
    if model.startswith(BUILTIN) and not (folder / "model.safetensors").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(BUILTIN_SEED)
            network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
            network.save_pretrained(staging)
            replace_file(Path(staging, "model.safetensors"), folder / "model.safetensors")
    if not any(folder.glob("*.safetensors")):
        fix = "Training and export need the weights as *.safetensors; preview and plan do without."
        raise UsageError(Problem(str(folder), "holds no weights", fix))
    if (folder / ADAPTER_CONFIG).exists():  # transformers would load the base that it names
        fix = "Give the folder of its base as `model`, and this one as tuning.start_from."
        raise UsageError(Problem(str(folder), "holds an adapter, no base model", fix))
    return folder


def read_config(folder: Path, *, has_media: bool) -> PreTrainedConfig:
    """The configuration of what is loaded of `folder` for a run on media, or on texts alone.

    Raises UsageError where transformers cannot read it, or where a tower is not as the published ones.
    """
    path = folder / "config.json"
    try:
        config = network_config(AutoConfig.from_pretrained(folder), has_media=has_media)
    except Exception as error:  # whatever transformers raises, this file was all that it read
        raise UsageError(_unusable(path, error)) from None
    if config.model_type in FAMILIES and (what := odd_tower(config)):
        raise UsageError(Problem(str(path), what, "Use the config.json of the published checkpoint."))
    return config


def _unusable(path: Path, error: Exception) -> Problem:
    words = " ".join(str(error).split())
    what = f"transformers makes no model of it: {type(error).__name__}: {words[:300]}"
    return Problem(str(path), what, MEND)


def load_model(
    folder: Path,
    *,
    dtype: Literal["bf16", "fp32"],
    four_bit: bool = False,
    attention: str = "sdpa",  # or one of `IMPLEMENTATIONS`
    device: torch.device | None = None,
    sharded: bool = False,
    has_media: bool = False,
) -> PreTrainedModel:
    """The causal language model of `folder`, its cache off, every key of it loaded; `sharded` only this rank's rows.

    With towers where the run `has_media`, or where the decoder is not to be had alone.

    On the meta device no weight is read, only what the files' headers say of them.

    Raises ResumeError where a file is damaged, and where a tensor is missing, of another shape or dtype, or not the
    model's: transformers would train on from an initial value and only log it.
    """
    stored = read_weights(folder)
    if problems := _odd_experts(stored):
        raise ResumeError(problems, OTHERS)
    config = read_config(folder, has_media=has_media)
    has_towers = config.model_type in FAMILIES
    options: dict[str, Any] = {"config": config, "dtype": DTYPES[dtype], "use_safetensors": True}
    options["attn_implementation"] = attention_of(config, attention)
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
            llm_int8_skip_modules=NOT_IN_4_BITS if has_towers else None,
        )
    # ZeRO-3 gives each rank its part by itself, and only where no device is named.
    if device is not None and device.type != "cpu" and not is_deepspeed_zero3_enabled():
        options["device_map"] = {"": device}
    with no_warm_up() if sharded else nullcontext():
        try:
            loader: Any = network_class(config)
            if sharded:
                loader = sharding(loader, device or torch.device("cpu"))
            model, info = loader.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except Exception as error:
            if device is None or device.type != "meta":
                raise
            raise ResumeError(_unusable(folder, error)) from None  # for no memory was taken and no weight read
    if problems := _unaccounted(folder, stored, info):
        raise ResumeError(problems, OTHERS)
    if four_bit:
        keep_four_bit_exact(model)
    _keep_rotary_exact(model)
    model.config.use_cache = False
    if has_towers:
        model.config.get_text_config().use_cache = False
        take_media(model)
    return model


def _unaccounted(folder: Path, stored: Mapping[str, StoredTensor], info: Mapping[str, Any]) -> list[Problem]:
    """The tensors that the model lacks, has no place for, or has in another shape; `info` is transformers' own."""
    kinds = {
        "missing_keys": "are missing",
        "unexpected_keys": "have no place in the model",
        "mismatched_keys": "are of another shape",
        "error_msgs": "could not be read",
    }
    problems: list[Problem] = []
    every = {str(tensor.file) for tensor in stored.values()}
    for kind, what in kinds.items():
        keys: list[Any] = sorted(info.get(kind) or (), key=str)
        if keys:
            names = [key if isinstance(key, str) else key[0] for key in keys]
            words = [key if isinstance(key, str) else _mismatch(*key) for key in keys]
            files = {str(stored[name].file) for name in names if name in stored} or every
            where = str(folder) if len(files) > 1 else min(files)
            problems.append(Problem(where, f"{len(keys)} tensors {what}: {listed(words)}"))
    return problems


def _odd_experts(stored: Mapping[str, StoredTensor]) -> list[Problem]:
    """Experts that are missing or unlike the others: transformers stacks them in order, whatever their numbers are."""
    experts: dict[str, dict[str, dict[int, StoredTensor]]] = {}
    for name, tensor in stored.items():
        if found := EXPERT.fullmatch(name):
            experts.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensor
    problems: list[Problem] = []
    for layer, matrices in experts.items():
        last = max(number for tensors in matrices.values() for number in tensors)
        for matrix, tensors in matrices.items():
            some = next(iter(tensors.values()))
            missing = [f"{layer}.{number}.{matrix}" for number in range(last + 1) if number not in tensors]
            other = [f"{layer}.{number}.{matrix}" for number, t in tensors.items() if t.shape != some.shape]
            if missing:
                problems.append(Problem(str(some.file), f"{len(missing)} tensors are missing: {listed(missing)}"))
            if other:
                what = f"{len(other)} tensors are of another shape than other experts': {listed(other)}"
                problems.append(Problem(str(some.file), what))
    return problems


def listed(names: Sequence[str]) -> str:
    """The first of many names of tensors."""
    return ", ".join(name[:120] for name in names[:NUM_NAMED]) + (" …" if len(names) > NUM_NAMED else "")


def _mismatch(name: str, there: Any, wanted: Any) -> str:
    return f"{name} {list(there)} for {list(wanted)}"


def recompute_layers(model: PreTrainedModel, layers: bool | int, *, towers: bool = False) -> None:
    """Switches activation checkpointing on for all decoder layers (True) or for the first `layers` of them.

    With `towers` for the blocks of towers too; a frozen one it would pull into the backward pass.
    """
    how = {"use_reentrant": False}
    has_towers = model.config.model_type in FAMILIES
    for name, module in model.named_modules() if towers and has_towers else ():
        if name.rpartition(".")[2] in TOWERS:
            cast(Any, module).gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if not layers:
        return
    network: Any = model.get_decoder() if has_towers else model
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if layers is not True:
        switched: list[Any] = [m for m in network.modules() if getattr(m, "gradient_checkpointing", False)]
        for layer in [m for m in switched if type(m).__name__.endswith("DecoderLayer")][layers:]:
            layer.gradient_checkpointing = False


def keep_four_bit_exact(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights at the first evaluation on CPUs with AVX512-BF16.

    A repacked layer evaluates unlike it trains, and merging it returns garbage.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _keep_rotary_exact(model: PreTrainedModel) -> None:
    """Makes rotary frequencies anew in fp32, where transformers before 5.23 has them in bf16 under ZeRO-3."""
    for module in model.modules():
        old: Any = getattr(module, "inv_freq", None)
        if isinstance(old, torch.Tensor) and old.dtype != torch.float32:
            fresh: Any = type(module)(module.config)
            for name, buffer in fresh.named_buffers():
                module.register_buffer(name, buffer.to(old.device), persistent=False)


def silence_loading() -> None:
    """Keeps libraries' loading bars off the user's screen."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
