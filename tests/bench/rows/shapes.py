"""The dimensions of models that the project itself does not train, and of Qwen's by the project's facts.

From the config.json of each; only what decides bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwentune.errors import UsageError
from qwentune.facts.models import MODELS, config_of, model_spec
from tests.bench.rows.settings import CannotDescribeError

# name: architecture, hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
SHAPES = {
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "smollm2-360m": ("llama", 960, 2560, 32, 15, 5, 49152, True),
    "smollm2-1.7b": ("llama", 2048, 8192, 24, 32, 32, 49152, True),
    "tinyllama-1.1b": ("llama", 2048, 5632, 22, 32, 4, 32000, False),
    "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 32000, False),
    "llama-2-13b": ("llama", 5120, 13824, 40, 40, 40, 32000, False),
    "llama-2-70b": ("llama", 8192, 28672, 80, 64, 8, 32000, False),
    "llama-3-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "llama-3-70b": ("llama", 8192, 28672, 80, 64, 8, 128256, False),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "llama-3.1-70b": ("llama", 8192, 28672, 80, 64, 8, 128256, False),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "mistral-7b-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 32768, False),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32000, False),
    "zephyr-7b": ("mistral", 4096, 14336, 32, 32, 8, 32000, False),
    "openbuddy-zephyr-7b": ("mistral", 4096, 14336, 32, 32, 8, 36608, False),
    "yi-6b": ("llama", 4096, 11008, 32, 32, 4, 64000, False),
    "yi-34b": ("llama", 7168, 20480, 60, 56, 8, 64000, False),
    "powerlm-3b": ("granite", 2304, 9216, 40, 36, 36, 49152, True),
    "granite-3.0-2b": ("granite", 2048, 8192, 40, 32, 8, 49155, True),
    "granite-3.0-8b": ("granite", 4096, 12800, 40, 32, 8, 49155, True),
    "granite-3.1-8b": ("granite", 4096, 12800, 40, 32, 8, 49155, True),
    "qwen1.5-0.5b": ("qwen2", 1024, 2816, 24, 16, 16, 151936, True),
    "qwen1.5-1.8b": ("qwen2", 2048, 5504, 24, 16, 16, 151936, False),
    "qwen1.5-4b": ("qwen2", 2560, 6912, 40, 20, 20, 151936, False),
    "qwen1.5-7b": ("qwen2", 4096, 11008, 32, 32, 32, 151936, False),
    "qwen1.5-14b": ("qwen2", 5120, 13696, 40, 40, 40, 152064, False),
    "qwen1.5-32b": ("qwen2", 5120, 27392, 64, 40, 8, 152064, False),
    "qwen2-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "qwen2-72b": ("qwen2", 8192, 29568, 80, 64, 8, 152064, False),
}
# What a name may carry after the size that changes no shape.
SUFFIX = r"(-(hf|base|chat|instruct|it|v0\.[12]|v1\.0|awq|gptq|int4|fp8|bnb|4bit|\d{4}|intermediate|step.*|unsloth))*"


def config_named(name: str) -> Mapping[str, Any]:
    """The configuration of a model as rows call it, in any case and with any owner."""
    lower = name.lower().rpartition("/")[2].replace("qwen1half", "qwen1.5").replace("meta-", "").replace("_", ".")
    stem = re.sub(SUFFIX + "$", "", lower)
    for known in MODELS:
        if known.lower().rpartition("/")[2] in (lower, stem) or re.sub(SUFFIX + "$", "", known.lower()).endswith(
            f"/{stem}"
        ):
            return _of_project(known)
    if re.fullmatch(r"qwen-\d+([._]\d+)?b", stem):
        raise CannotDescribeError("Qwen-1 runs code of its own checkpoint, which is not here")
    if stem not in SHAPES:
        raise CannotDescribeError(f"the shape of {name} is not known here")
    kind, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[stem]
    config = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }
    if kind == "mistral":
        config["sliding_window"] = None
    return config


def _of_project(name: str) -> Mapping[str, Any]:
    try:
        return config_of(model_spec(name))
    except UsageError as error:
        raise CannotDescribeError(str(error)) from None
