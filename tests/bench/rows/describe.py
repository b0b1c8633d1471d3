"""A row of the CSV as the settings of a step: read from its columns and notes by rule.

Where a library's defaults decide, the rule names them; a row whose bytes depend on what it does not say is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from qwentune.facts.gpus import GPUS, GpuSpec
from qwentune.memory.settings import device_overheads
from tests.bench.rows.settings import CannotDescribeError, RowSettings
from tests.bench.rows.shapes import config_named

Row = Mapping[str, str]

UNITS = {"bytes": 1, "mib": 2**20, "gib": 2**30, "mb": 10**6}
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
MLP = ("gate_proj", "up_proj", "down_proj")


def measured_bytes(row: Row) -> int:
    """What was measured on one GPU; where the unit is in doubt, as the CSV's own column reads it."""
    unit = UNITS.get(row["unit"].lower())
    text = row["measured_raw"]
    if unit and re.fullmatch(r"[\d.]+", text):
        return round(float(text) * unit)
    try:
        return round(float(row["peak_gib_per_gpu"]) * 2**30)
    except ValueError:
        raise CannotDescribeError(f"no number was measured: {text or 'empty'}") from None


def described(row: Row) -> RowSettings:
    """The step of a row.

    Raises:
        CannotDescribeError: what is missing, or what no step here has.
    """
    if row["quality"].startswith("C"):
        raise CannotDescribeError("its configuration is known in part only (quality C)")
    framework, method = row["framework"].lower(), row["method"].lower()
    _refuse(row)
    kind = _kind(method)
    config = config_named(row["model"])
    gpu = _gpu(row["gpu"])
    transformers = _version(framework)
    is_fms = "fms" in framework
    autocast = _autocast(row, kind, is_fms)
    upcast = _upcast(row, kind, is_fms)
    dtype = _dtype(row["precision"])
    return RowSettings(
        config=config,
        dtype=dtype,
        kind=kind,
        tokens=_tokens(row["seq_len"]),
        micro_batch=_number(row["micro_batch"], "the micro-batch"),
        accumulation=_number(row["grad_accum"] or "1", "the accumulation"),
        rank=0 if kind == "full" else _number(row["rank"], "the rank"),
        targets=() if kind == "full" else _targets(row["targets"]),
        dropout=_dropout(row, kind),
        # fms-acceleration's loader of 4-bit weights always quantises the scales too.
        double_quantised=kind == "qlora" and (is_fms or "dq" in method or "double" in row["precision"].lower()),
        upcast=upcast,
        autocast=autocast,
        checkpointing=_checkpointing(row["grad_ckpt"].lower()),
        # transformers 4 checkpoints reentrantly unless it is told otherwise, as canifinetune does.
        reentrant="non-reentrant" not in row["grad_ckpt"].lower()
        and transformers < (5, 0)
        and "canifinetune" not in framework,
        attention=_attention(row, config, gpu, transformers, reads_fp32=upcast == "all" and not autocast),
        loss=_loss(row["loss_kernel"].lower()),
        transformers=transformers,
        # In a plain loop the outputs live until the next step's replace them; a Trainer's function drops them.
        keeps_outputs=any(word in framework for word in ("loop", "method_comparison", "canifinetune")),
        fused_norms="foak" in framework,
        fused_adapters="foak" in framework and kind == "qlora",
        optimizer=_optimizer(row["optimizer"].lower()),
        sharding=_sharding(row),
        ranks=_number(row["n_gpus"] or "1", "the number of GPUs"),
        overheads=device_overheads(gpu or GPUS["a100-80gb"]),
        statistic=_statistic(row["statistic"].lower()),
    )


def _refuse(row: Row) -> None:
    method, notes, parallelism = (row[key].lower() for key in ("method", "notes", "parallelism"))
    for word, reason in {
        "dpo": "preference losses are not described",
        "galore": "GaLore's projected states are not described",
        "lisa": "LISA trains other layers from step to step",
        "llamapro": "added blocks are not described",
        "adalora": "AdaLoRA is not described",
        "dora": "DoRA's norms are not described",
        "vera": "VeRA is not described",
        "oft": "OFT and BOFT are not described",
        "bone": "Bone is not described",
        "+emb": "embeddings trained beside adapters are not described",
        "fp8": "8-bit floats are not described",
        "unsloth": "Unsloth's own layers are not described",
    }.items():
        if word in method:
            raise CannotDescribeError(reason)
    if re.fullmatch(r"adapter|ln.?tuning|(prompt|prefix|p).?tuning|ia3|bitfit", method):
        raise CannotDescribeError(f"{row['method']} is not described")
    for kernel in ("gptq", "awq", "hqq"):
        if kernel in method:
            raise CannotDescribeError(f"{kernel.upper()}'s 4-bit kernels are not described")
    if "short" in notes:
        raise CannotDescribeError("its sequences are shorter than the maximum, their lengths are not stated")
    if re.search(r"\b(tp|pp|ep|ulysses|device_map)\d*", parallelism) or "device_map" in parallelism:
        raise CannotDescribeError(f"{row['parallelism']} is not described")


def _kind(method: str) -> Literal["full", "lora", "qlora"]:
    for kind in ("qlora", "lora", "full"):
        if kind in method:
            return kind
    raise CannotDescribeError(f"only full tuning, LoRA and QLoRA are described, not {method or 'an unnamed method'}")


def _version(framework: str) -> tuple[int, int]:
    if found := re.search(r"transformers[ =v]*(\d+)\.(\d+|x)", framework):
        major, minor = found.groups()
        return int(major), 0 if minor == "x" else int(minor)
    if "qwenlm/qwen" in framework or re.search(r"swift [12]\.", framework):
        return 4, 37  # what they needed then
    return 5, 0


def _dtype(precision: str) -> Literal["fp16", "bf16", "fp32"]:
    """Of the base, which is the 16-bit one where a 16-bit and a 32-bit one are named."""
    text = precision.lower().replace("bfloat", "bf").replace("float", "fp")
    found = re.search(r"fp16|bf16", text) or re.search(r"fp32", text)
    if not found:
        raise CannotDescribeError(f"no precision is stated: {precision or 'empty'}")
    return found.group()  # pyright: ignore[reportReturnType]


def _checkpointing(text: str) -> bool:
    if not text:
        raise CannotDescribeError("whether layers are checkpointed is not stated")
    return re.match(r"(no|not|none|false|off|0)\b(?!-)", text) is None


def _autocast(row: Row, kind: str, is_fms: bool) -> bool:
    text = f"{row['precision']} {row['notes']}".lower()
    if re.search(r"\b(no|without) (amp|autocast)", text):
        return False
    if re.search(r"\b(amp|autocast)\b", text):
        return True
    if is_fms:
        # Its scenarios.yaml asks for mixed precision with 4-bit weights only, its other scenario files always.
        return kind == "qlora" or not row["source"].rstrip().endswith("a100_80gb.csv")
    return any(word in row["framework"].lower() for word in ("trainer", "trl", "swift", "finetune.py"))


def _upcast(row: Row, kind: str, is_fms: bool) -> Literal["", "all", "norms"]:
    if kind != "qlora":
        return ""
    if is_fms:
        # TRL prepares for k-bit training, but not what is sharded, and takes embedding and head back to bf16.
        is_baseline = "baseline" in row["framework"].lower() and row["parallelism"] == "single"
        return "norms" if is_baseline else ""
    text = f"{row['precision']} {row['notes']}".lower()
    if re.search(r"\bno (k-?bit|upcast|prepare)", text):
        return ""
    return "all" if re.search(r"prepare_model_for_kbit|k-?bit|upcast|norm[^,;]* fp32|fp32 (norm|embed)", text) else ""


def _tokens(text: str) -> int:
    if found := re.fullmatch(r"\D{0,3}(\d+)( .*)?", text.strip()):
        return int(found.group(1))
    raise CannotDescribeError(f"no sequence length is stated: {text or 'empty'}")


def _number(text: str, what: str) -> int:
    if found := re.fullmatch(r"(\d+)(\.0)?", text.strip()):
        return int(found.group(1))
    raise CannotDescribeError(f"{what} is not stated: {text or 'empty'}")


def _targets(text: str) -> tuple[str, ...] | str:
    lower = text.lower()
    if re.search(r"all.?linear|^all$", lower):
        return "all-linear"
    if found := re.search(r"\(([^)]*)\)", lower):
        lower = found.group(1)
    names: list[str] = []
    for word in re.split(r"[,\s+;/]+", lower):
        if word in ("mlp", "ffn"):
            names += MLP
        elif word.removesuffix("_proj") in PROJECTIONS:
            names.append(PROJECTIONS[word.removesuffix("_proj")])
        elif word.removesuffix("_proj") + "_proj" in MLP:
            names.append(word.removesuffix("_proj") + "_proj")
        elif word in ("attn", "attention", "qkvo"):
            names += PROJECTIONS.values()
        else:
            raise CannotDescribeError(f"its target modules are not known here: {text or 'empty'}")
    return tuple(dict.fromkeys(names))


def _dropout(row: Row, kind: str) -> float:
    if kind == "full":
        return 0.0
    if found := re.search(r"dropout[ =:]*(0?\.\d+|0)", row["notes"].lower()):
        return float(found.group(1))
    # The defaults of ms-swift and of Qwen's own script; PEFT's is none.
    return 0.05 if any(word in row["framework"].lower() for word in ("swift", "finetune.py")) else 0.0


def _attention(
    row: Row, config: Mapping[str, Any], gpu: GpuSpec | None, transformers: tuple[int, int], reads_fp32: bool
) -> Literal["eager", "efficient", "tiled", "repeated", "math"]:
    text = row["attn_kernel"].lower()
    is_grouped = config["num_key_value_heads"] != config["num_attention_heads"]
    if "eager" in text:
        return "eager"
    if "efficient" in text:
        return "efficient"
    if "math" in text:
        return "math"
    if "flash" in text:
        return "tiled"
    if "sdpa" not in text:
        raise CannotDescribeError(f"no attention kernel is stated: {text or 'empty'}")
    # Since 4.48 transformers leaves grouped heads to SDPA, which then has no kernel for fp32 but the math one.
    groups_in_kernel = is_grouped and transformers >= (4, 48) and "expanded" not in text
    if reads_fp32 or (gpu is not None and gpu.compute_capability < (8, 0)):
        return "math" if groups_in_kernel else "efficient"
    return "tiled" if groups_in_kernel or not is_grouped else "repeated"


def _loss(text: str) -> Literal["hf", "unsloth", "liger"]:
    if "unsloth" in text:
        return "unsloth"
    if "liger" in text or "flce" in text or "fused linear" in text:
        return "liger"
    if re.search(r"\bhf\b|cross.?entropy|^ce$|\btorch\b", text):
        return "hf"
    raise CannotDescribeError(f"its loss is not described: {text or 'not stated'}")


def _optimizer(text: str) -> Literal["foreach", "fused", "8bit", "paged-8bit"]:
    is_8bit = re.search(r"8.?bit", text)
    if re.search(r"muon|galore|sgd|adafactor|lion", text) or "adam" not in text or ("paged" in text and not is_8bit):
        raise CannotDescribeError(f"its optimizer is not described: {text or 'not stated'}")
    if is_8bit:
        return "paged-8bit" if "paged" in text else "8bit"
    return "fused" if "fused" in text else "foreach"  # torch's own choice on a GPU


def _sharding(row: Row) -> Literal["none", "fsdp1", "ddp"]:
    text = row["parallelism"].lower()
    if text in ("single", "none", ""):
        return "none"
    if text in ("fsdp1", "fsdp") and "fms" in row["framework"].lower():
        return "fsdp1"
    if text == "ddp":
        return "ddp"
    raise CannotDescribeError(f"{row['parallelism']} is not described for this framework")


def _statistic(text: str) -> Literal["allocated", "reserved", "process"]:
    if "max_memory_allocated" in text:
        return "allocated"
    return "reserved" if "reserved" in text else "process"


def _gpu(name: str) -> GpuSpec | None:
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    matches = [key for key in GPUS if set(key.split("-")) <= words]
    return GPUS[max(matches, key=len)] if matches else None
