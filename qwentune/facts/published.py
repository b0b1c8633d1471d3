"""The table of Qwen text checkpoints: shapes shared by many ids, then one line per group of ids.

Sources, by the short names used in the rows:
  litgpt     Lightning-AI/litgpt@26857050 litgpt/config.py
  maxtext    AI-Hypercomputer/maxtext@e591f30c configs/models/qwen*.yml
  pai        alibaba/Pai-Megatron-Patch@a098ca5a run scripts
  mindspeed  Ascend/MindSpeed-LLM before 29e8a07a
  torchtune  torchtune@bd2a0fc7
  keras      keras-team/keras-hub@71453d08 (exact parameter counts)
  blog       QwenLM/qwenlm.github.io@1f89f8c8 (context, licences)
  swift      modelscope/ms-swift@3602360a swift/model/models/qwen.py (hub ids)
  torchtitan pytorch/torchtitan@b5bcd76c models/qwen3_5
  transformers  the default values of its configuration classes, 5.24
  cards      model cards and dates of QwenLM/Qwen3.8@2ea10dc7 and BigBIueWhale/qwen_38_agent_setup@f18f7b32
  coder      QwenLM/Qwen2.5-Coder@d5ead97f and QwenLM/Qwen3-Coder@0ae30f55
"unverified" marks what none of them states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qwentune.facts.architecture import Kind, LinearAttentionSpec, ModelSpec, MoeSpec


@dataclass(frozen=True, slots=True)
class _Shape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_rows: int
    tied: bool
    head_dim: int = 128
    moe: MoeSpec | None = None
    linear_attention: LinearAttentionSpec | None = None


# fmt: off
def _hybrid(
    num_layers: int, hidden_size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, vocab_rows: int,
    tied: bool, value_heads: int, moe: MoeSpec | None = None,
) -> _Shape:
    linear = LinearAttentionSpec(num_key_heads=16, num_value_heads=value_heads, key_head_dim=128, value_head_dim=128)
    return _Shape(
        num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, vocab_rows, tied, 256, moe, linear
    )


#          layers  hidden  intermediate heads kv   rows  tied
_QWEN1_5 = {
    "0.5B": _Shape(24, 1024,   2816, 16, 16, 151936, True, head_dim=64),
    "1.8B": _Shape(24, 2048,   5504, 16, 16, 151936, False),
    "4B":   _Shape(40, 2560,   6912, 20, 20, 151936, False),
    "7B":   _Shape(32, 4096,  11008, 32, 32, 151936, False),
    "14B":  _Shape(40, 5120,  13696, 40, 40, 152064, False),
    "32B":  _Shape(64, 5120,  27392, 40,  8, 152064, False),
    "72B":  _Shape(80, 8192,  24576, 64, 64, 152064, False),
    "110B": _Shape(80, 8192,  49152, 64,  8, 152064, False),
    "MoE-A2.7B": _Shape(24, 2048, 5632, 16, 16, 151936, False, moe=MoeSpec(60, 4, 1408, 5632)),
}
_CODE_QWEN1_5 = {"7B": _Shape(32, 4096, 13440, 32, 4, 92416, False)}
_QWEN2 = {  # also Qwen2.5, Coder, Math and QwQ
    "0.5B": _Shape(24,  896,   4864, 14,  2, 151936, True, head_dim=64),
    "1.5B": _Shape(28, 1536,   8960, 12,  2, 151936, True),
    "3B":   _Shape(36, 2048,  11008, 16,  2, 151936, True),
    "7B":   _Shape(28, 3584,  18944, 28,  4, 152064, False),
    "14B":  _Shape(48, 5120,  13824, 40,  8, 152064, False),
    "32B":  _Shape(64, 5120,  27648, 40,  8, 152064, False),
    "72B":  _Shape(80, 8192,  29568, 64,  8, 152064, False),
    "57B-A14B": _Shape(28, 3584, 18944, 28, 4, 151936, False, moe=MoeSpec(64, 8, 2560, 20480)),
}
_QWEN3 = {
    "0.6B": _Shape(28, 1024,   3072, 16,  8, 151936, True),
    "1.7B": _Shape(28, 2048,   6144, 16,  8, 151936, True),
    "4B":   _Shape(36, 2560,   9728, 32,  8, 151936, True),
    "8B":   _Shape(36, 4096,  12288, 32,  8, 151936, False),
    "14B":  _Shape(40, 5120,  17408, 40,  8, 151936, False),
    "32B":  _Shape(64, 5120,  25600, 64,  8, 151936, False),
    "30B-A3B":   _Shape(48, 2048,  6144, 32, 4, 151936, False, moe=MoeSpec(128, 8, 768)),
    "235B-A22B": _Shape(94, 4096, 12288, 64, 4, 151936, False, moe=MoeSpec(128, 8, 1536)),
    "480B-A35B": _Shape(62, 6144,  8192, 96, 8, 151936, False, moe=MoeSpec(160, 8, 2560)),
}
#             layers  hidden  intermediate heads kv   rows  tied  linear value heads
_QWEN3_NEXT = {
    "80B-A3B":   _hybrid(48, 2048,  5120, 16, 2, 151936, False, 32, MoeSpec(512, 10, 512, 512)),
}
_QWEN3_5 = {  # also Qwen3.6 and 3.8
    "0.8B":      _hybrid(24, 1024,  3584,  8, 2, 248320, True, 16),
    "2B":        _hybrid(24, 2048,  6144,  8, 2, 248320, True, 16),
    "4B":        _hybrid(32, 2560,  9216, 16, 4, 248320, True, 32),
    "9B":        _hybrid(32, 4096, 12288, 16, 4, 248320, False, 32),
    "27B":       _hybrid(64, 5120, 17408, 24, 4, 248320, False, 48),
    "35B-A3B":   _hybrid(40, 2048,     0, 16, 2, 248320, False, 32, MoeSpec(256, 8, 512, 512)),
    "122B-A10B": _hybrid(48, 3072,     0, 32, 2, 248320, False, 64, MoeSpec(256, 8, 1024, 1024)),
    "397B-A17B": _hybrid(60, 4096,     0, 32, 2, 248320, False, 64, MoeSpec(512, 10, 1024, 1024)),
}

_BASE_CHAT: Mapping[str, Kind] = {"": "base", "-Chat": "chat"}
_BASE: Mapping[str, Kind] = {"": "base"}
_INSTRUCT: Mapping[str, Kind] = {"-Instruct": "chat"}
_BASE_INSTRUCT: Mapping[str, Kind] = {**_BASE, **_INSTRUCT}
_2507: Mapping[str, Kind] = {"-Instruct-2507": "chat", "-Thinking-2507": "thinking"}

_APACHE, _QWEN, _RESEARCH = "Apache-2.0", "Qwen", "Qwen Research"
_TONGYI, _TONGYI_U = "Tongyi Qianwen", "Tongyi Qianwen (unverified)"

_DIMS1 = "dims pai, mindspeed; ids swift"
_DIMS2 = "dims litgpt, torchtune, pai; context and licence blog; ids swift"
_DIMS2_MOE = "dims pai, count keras; context and licence blog; ids swift"
_DIMS3 = "dims litgpt, maxtext; ids swift"
_DIMS_NEXT = _DIMS3
_DIMS3_5 = "dims torchtitan, maxtext, transformers; ids swift"
_DIMS_MATH = "dims, rope and context litgpt; ids swift"
_DIMS_MATH2 = "as Qwen2.5-Math, unverified; ids swift"

_FAMILIES = {"qwen3": _QWEN3, "qwen3_next": _QWEN3_NEXT, "qwen3_5": _QWEN3_5}


def _rows(
    name: str, shapes: Mapping[str, _Shape], sizes: str, kinds: Mapping[str, Kind],
    positions: int, licence: str, source: str, rope: float = 1e6,
) -> Iterator[ModelSpec]:
    """One spec per size and suffix; `{}` in `name` stands for the size."""
    family = next((family for family, rows in _FAMILIES.items() if rows is shapes), "qwen2")
    is_qwen3 = family != "qwen2"
    for size in sizes.split():
        shape = shapes[size]
        for suffix, kind in kinds.items():
            yield ModelSpec(
                id=f"Qwen/{name.format(size)}{suffix}",
                model_type=_model_type(family, shape),
                num_layers=shape.num_layers, hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size, num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, vocab_rows=shape.vocab_rows,
                tied=shape.tied, max_positions=positions, rope_theta=rope, qkv_bias=not is_qwen3,
                qk_norm=is_qwen3, kind=kind, moe=shape.moe, licence=licence, source=source,
                linear_attention=shape.linear_attention,
                tower_of=_model_type(family, shape).removesuffix("_text") if family == "qwen3_5" else None,
            )


def _model_type(family: str, shape: _Shape) -> str:
    if family == "qwen3_next":
        return family
    return family + ("_moe" if shape.moe else "") + ("_text" if family == "qwen3_5" else "")


def _table() -> Iterator[ModelSpec]:
    yield from _rows("Qwen1.5-{}", _QWEN1_5, "0.5B", _BASE_CHAT, 32768,
                     "Tongyi Qianwen Research (unverified)", _DIMS1)
    yield from _rows("Qwen1.5-{}", _QWEN1_5, "1.8B 7B 14B 32B 72B 110B MoE-A2.7B", _BASE_CHAT, 32768,
                     _TONGYI_U, _DIMS1)
    yield from _rows("Qwen1.5-{}", _QWEN1_5, "4B", _BASE_CHAT, 32768, _TONGYI_U,
                     "dims pai, mindspeed; rope mindspeed; ids swift", rope=5e6)
    yield from _rows("CodeQwen1.5-{}", _CODE_QWEN1_5, "7B", _BASE_CHAT, 65536, _TONGYI_U,
                     "dims mindspeed; ids swift")

    yield from _rows("Qwen2-{}", _QWEN2, "0.5B 1.5B", _BASE_INSTRUCT, 32768, _APACHE, _DIMS2)
    yield from _rows("Qwen2-{}", _QWEN2, "7B", _BASE_INSTRUCT, 131072, _APACHE, _DIMS2)
    yield from _rows("Qwen2-{}", _QWEN2, "72B", _BASE_INSTRUCT, 131072, _TONGYI, _DIMS2)
    yield from _rows("Qwen2-{}", _QWEN2, "57B-A14B", _BASE_INSTRUCT, 65536, _APACHE, _DIMS2_MOE)
    yield from _rows("Qwen2-Math-{}", _QWEN2, "1.5B 7B", _BASE_INSTRUCT, 4096, _APACHE, _DIMS_MATH2, rope=1e4)
    yield from _rows("Qwen2-Math-{}", _QWEN2, "72B", _BASE_INSTRUCT, 4096, _TONGYI, _DIMS_MATH2, rope=1e4)

    yield from _rows("Qwen2.5-{}", _QWEN2, "0.5B", _BASE, 32768, _APACHE, _DIMS2)
    yield from _rows("Qwen2.5-{}", _QWEN2, "3B", _BASE_INSTRUCT, 32768, _RESEARCH, _DIMS2)
    yield from _rows("Qwen2.5-{}", _QWEN2, "1.5B 7B 14B 32B", _BASE, 131072, _APACHE, _DIMS2)
    yield from _rows("Qwen2.5-{}", _QWEN2, "0.5B 1.5B 7B 14B 32B", _INSTRUCT, 32768, _APACHE, _DIMS2)
    yield from _rows("Qwen2.5-{}", _QWEN2, "72B", _BASE, 131072, _QWEN, _DIMS2)
    yield from _rows("Qwen2.5-{}", _QWEN2, "72B", _INSTRUCT, 32768, _QWEN, _DIMS2)
    yield from _rows("Qwen2.5-{}-Instruct-1M", _QWEN2, "7B 14B", {"": "chat"}, 1010000, _APACHE,
                     "dims, rope and context litgpt; ids swift", rope=1e7)
    yield from _rows("Qwen2.5-Coder-{}", _QWEN2, "0.5B 1.5B 7B 14B 32B", _BASE_INSTRUCT, 32768, _APACHE,
                     "dims and context coder, litgpt; ids swift")
    yield from _rows("Qwen2.5-Coder-{}", _QWEN2, "3B", _BASE_INSTRUCT, 32768, _RESEARCH,
                     "intermediate 11008: the report prints 4864, the published count needs 11008; ids swift")
    yield from _rows("Qwen2.5-Math-{}", _QWEN2, "1.5B 7B", _BASE_INSTRUCT, 4096, _APACHE, _DIMS_MATH, rope=1e4)
    yield from _rows("Qwen2.5-Math-{}", _QWEN2, "72B", _BASE_INSTRUCT, 4096, _QWEN, _DIMS_MATH, rope=1e4)
    yield from _rows("QwQ-{}", _QWEN2, "32B", {"": "thinking"}, 131072, _APACHE, "litgpt; ids swift")
    yield from _rows("QwQ-{}-Preview", _QWEN2, "32B", {"": "chat"}, 32768, _APACHE, "litgpt; ids swift")

    yield from _rows("Qwen3-{}", _QWEN3, "0.6B 1.7B 4B 8B 14B 32B 30B-A3B 235B-A22B", {"": "hybrid"},
                     40960, _APACHE, _DIMS3)
    yield from _rows("Qwen3-{}-Base", _QWEN3, "0.6B 1.7B 4B 8B 14B 30B-A3B", {"": "base"}, 32768, _APACHE,
                     _DIMS3 + "; rope unverified")
    yield from _rows("Qwen3-{}", _QWEN3, "4B 235B-A22B", _2507, 262144, _APACHE, _DIMS3, rope=5e6)
    yield from _rows("Qwen3-{}", _QWEN3, "30B-A3B", _2507, 262144, _APACHE, _DIMS3, rope=1e7)
    yield from _rows("Qwen3-Coder-{}-Instruct", _QWEN3, "30B-A3B 480B-A35B", {"": "chat"}, 262144, _APACHE,
                     "dims litgpt, maxtext; context coder; ids swift", rope=1e7)

    yield from _rows("Qwen3-Next-{}", _QWEN3_NEXT, "80B-A3B", {"-Instruct": "chat", "-Thinking": "thinking"},
                     262144, _APACHE, _DIMS_NEXT, rope=1e7)
    yield from _rows("Qwen3.5-{}", _QWEN3_5, "0.8B 2B 4B 9B 27B 35B-A3B 122B-A10B 397B-A17B", {"": "hybrid"},
                     262144, _APACHE, _DIMS3_5, rope=1e7)
    yield from _rows("Qwen3.5-{}-Base", _QWEN3_5, "0.8B 2B 4B 9B 35B-A3B", _BASE, 262144, _APACHE, _DIMS3_5, rope=1e7)
    yield from _rows("Qwen3.6-{}", _QWEN3_5, "27B 35B-A3B", {"": "hybrid"}, 262144, _APACHE,
                     _DIMS3_5 + "; cards", rope=1e7)
    yield from _rows("Qwen3.8-{}", _QWEN3_5, "27B", {"": "hybrid"}, 262144, _APACHE, _DIMS3_5 + "; cards", rope=1e7)


TINY_QWEN3 = ModelSpec(
    id="builtin:tiny-qwen3", model_type="qwen3", num_layers=2, hidden_size=128, intermediate_size=384,
    num_heads=4, num_kv_heads=2, head_dim=32, vocab_rows=151936, tied=True, max_positions=4096, rope_theta=1e6,
    qkv_bias=False, qk_norm=True, kind="hybrid", moe=None, licence="Apache-2.0",
    source="qwentune: random weights, made to be learned in minutes",
)
# fmt: on

MODELS: Mapping[str, ModelSpec] = {spec.id: spec for spec in (TINY_QWEN3, *_table())}
"""Every known checkpoint by its full hub id (`Qwen/...`) or `builtin:` name."""
