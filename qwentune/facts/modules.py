"""The modules of a decoder that can carry adapters, named as transformers names them; free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwentune.errors import Problem, nearest
from qwentune.facts.architecture import FUSED_ADAPTED_EXPERTS, ModelSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")
ROUTER, SHARED_GATE = "gate", "shared_expert_gate"
# Of Qwen3-Next; Qwen3.5 has one for each of what the first two hold together.
FUSED_INPUTS, SINGLE_INPUTS = ("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
LINEAR_INPUTS = (*FUSED_INPUTS, *SINGLE_INPUTS)
LINEAR_ATTENTION = (*LINEAR_INPUTS, "out_proj")


def adaptable_modules(spec: ModelSpec) -> tuple[str, ...]:
    """The full name of everything that an adapter can stand around.

    PEFT takes experts that are held as one by the names of a feed-forward block, and those of all layers at once: they
    stand here without a layer's number.
    """
    return (*_linear_modules(spec), *(f"model.{name}" if name == "embed_tokens" else name for name in EMBEDDINGS))


def adapted_modules(spec: ModelSpec, targets: str | Sequence[str]) -> frozenset[str]:
    """The full names of what `tuning.targets` asks for: `all-linear`, or names and ends of names."""
    if targets == "all-linear":
        return frozenset(_linear_modules(spec))
    return frozenset(name for name in adaptable_modules(spec) if any(_names(target, name) for target in targets))


def unknown_targets(spec: ModelSpec, targets: str | Sequence[str]) -> list[Problem]:
    """Each of the `tuning.targets` that names no module of the model, with the nearest that does."""
    if targets == "all-linear":
        return []
    modules = adaptable_modules(spec)
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    fix = f"Use all-linear, or some of {', '.join(kinds)}."
    problems: list[Problem] = []
    for number, target in enumerate(targets):
        if any(_names(target, name) for name in modules):
            continue
        num_parts = target.count(".") + 1
        known = kinds if num_parts == 1 else dict.fromkeys(".".join(name.split(".")[-num_parts:]) for name in modules)
        what = f"no module of {spec.id} is called '{target}'.{nearest(target, known)}"
        problems.append(Problem(f"tuning.targets.{number}", what, fix))
    return problems


def _names(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _linear_modules(spec: ModelSpec) -> Iterator[str]:
    """What `all-linear` adapts: every linear module but the head, and experts that are held as one."""
    fuses_experts = spec.model_type in FUSED_ADAPTED_EXPERTS
    for number in range(spec.num_layers):
        layer = f"model.layers.{number}"
        if (number + 1) % spec.period == 0:
            yield from (f"{layer}.self_attn.{name}" for name in ATTENTION)
        else:
            inputs = FUSED_INPUTS if spec.model_type == "qwen3_next" else SINGLE_INPUTS
            yield from (f"{layer}.linear_attn.{name}" for name in (*inputs, "out_proj"))
        if spec.moe is None:
            yield from (f"{layer}.mlp.{name}" for name in FEED_FORWARD)
        elif spec.moe.shared_intermediate:
            if not fuses_experts:  # there the names mean the routed experts
                yield from (f"{layer}.mlp.shared_expert.{name}" for name in FEED_FORWARD)
            yield f"{layer}.mlp.{SHARED_GATE}"
    if fuses_experts:
        yield from (f"mlp.experts.{name}" for name in FEED_FORWARD)
        yield f"mlp.{ROUTER}"
