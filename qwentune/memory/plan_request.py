"""What a recipe asks of a plan, and what of it contradicts itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from qwentune.data.layout.row_media import RowMedia
from qwentune.errors import Problem
from qwentune.facts.architecture import FUSED_ADAPTED_EXPERTS, ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.facts.launch import Sharding, uses_deepspeed
from qwentune.facts.modules import FEED_FORWARD, unknown_targets
from qwentune.facts.towers import sharding_problem
from qwentune.memory.settings import (
    Attention,
    Dtype,
    HostMemory,
    Loss,
    Settings,
    StateDtype,
    Targets,
    TowerUse,
    Tuning,
)

Auto: TypeAlias = Literal["auto"]
Device: TypeAlias = GpuSpec | HostMemory

NOT_FOR_BITSANDBYTES: tuple[Sharding, ...] = ("zero3", "fsdp2", "zero2-offload", "zero3-offload")


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a recipe asks for, as far as it decides bytes and seconds; "auto" leaves the choice to the plan.

    `branches` says that rows may hold examples that share beginnings.
    `kernels` are the packages of fused kernels for hybrids that the run will find. `sharding` is what the launch file
    gives. `optimizer_steps` is None where the data has not been counted.
    `towers` are what a row gives to what sees and hears, None where that is not loaded; `largest` is what the rendered
    data shows at most, None where it was not looked at.
    `host_free_bytes` and `disk_free_bytes` are what the system says, None where it is not judged. `headroom` is the
    fraction of the device's memory that stays free. `answers` says that evaluations answer held-out prompts.
    """

    kind: Tuning
    max_tokens: int
    sequences_per_step: int
    rank: int = 16
    targets: Targets = "all-linear"
    drops: bool = False
    dora: bool = False
    trains_rows: bool = False
    branches: bool = False
    micro_batch: int | Auto = "auto"
    gradient_checkpointing: bool | int | Auto = "auto"
    loss: Loss | Auto = "auto"
    attention: Attention | Auto = "auto"
    sharding: Sharding | Auto = "auto"
    num_gpus: int = 1
    num_machines: int = 1
    weights: Dtype | Auto = "auto"
    adapters: Dtype | Auto = "auto"
    optimizer_state: StateDtype | Auto = "auto"
    kernels: frozenset[str] = frozenset()
    headroom: float = 0.03
    keep: int = 3
    optimizer_steps: int | None = None
    host_free_bytes: int | None = None
    disk_free_bytes: int | None = None
    towers: TowerUse | None = None
    largest: RowMedia | None = None
    answers: bool = False

    def settings(self, device: Device, **choices: Any) -> Settings:
        """The settings of a training step with what was chosen: every field of `Settings` that is not fixed here."""
        return Settings(
            kind=self.kind,
            max_tokens=self.max_tokens,
            num_ranks=self.num_gpus,
            num_machines=self.num_machines,
            rank=self.rank,
            targets=self.targets,
            drops=self.drops,
            dora=self.dora,
            trains_rows=self.trains_rows,
            branches=self.branches,
            on_cpu=isinstance(device, HostMemory),
            fuses_delta_rule="fla" in self.kernels,
            fuses_convolution="causal_conv1d" in self.kernels,
            towers=self.towers,
            answers=self.answers,
            **choices,
        )


def usable_bytes(device: Device, request: PlanRequest) -> int:
    """What one rank may take of the device; the ranks of a CPU run share its memory."""
    if isinstance(device, GpuSpec):
        return int(device.total_bytes * (1 - request.headroom))
    return int(device.free_bytes * request.num_machines // request.num_gpus * (1 - request.headroom))


def request_problems(spec: ModelSpec, request: PlanRequest) -> list[Problem]:
    """Why the ranks cannot share the batch, or what model, libraries or host do not take; empty where all is well."""
    problems = [*_target_problems(spec, request), *_expert_problems(spec, request), *_hybrid_problems(spec, request)]
    if request.loss == "supervised" and adapts_head(request):
        what = "supervised, but an adapter on lm_head makes all logits at once"
        problems.append(Problem("memory.loss", what, "Leave it at auto, or leave lm_head out of tuning.targets."))
    if request.kind == "qlora" and request.sharding in NOT_FOR_BITSANDBYTES:
        what = f"{request.sharding}, but bitsandbytes' 4-bit weights are neither sharded nor offloaded"
        problems.append(Problem("hardware.launch", what, "Leave it at auto, or take ddp, or tuning.kind=lora."))
    if request.towers is not None and request.sharding != "auto":
        problem = sharding_problem(spec, request.sharding, tuned=request.towers.is_tuned)
        problems += [] if problem is None else [problem]
    if request.optimizer_state == "8bit" and request.sharding != "auto" and uses_deepspeed(request.sharding):
        what = f"8bit, but {request.sharding} is DeepSpeed's, which cuts every state to the length of the weights"
        fix = "Leave it at auto, or take hardware.launch=fsdp2, or ddp."
        problems.append(Problem("precision.optimizer_state", what, fix))
    rows, ranks = request.sequences_per_step, request.num_gpus
    if rows % ranks:
        below = rows // ranks * ranks
        nearby = f"{below} or {below + ranks}" if below else str(ranks)
        problems.append(
            Problem(
                "batch.sequences_per_step",
                f"{rows} rows per step cannot be shared evenly by {ranks} processes.",
                f"Use {nearby}, or change hardware.count.",
            )
        )
    elif request.micro_batch != "auto" and rows // ranks % request.micro_batch:
        fitting = ", ".join(str(divisor) for divisor in divisors(rows // ranks))
        problems.append(
            Problem(
                "batch.micro_batch",
                f"{request.micro_batch} does not divide the {rows // ranks} rows that each process takes per step.",
                f"Use auto, or one of {fitting}.",
            )
        )
    return problems


def _target_problems(spec: ModelSpec, request: PlanRequest) -> list[Problem]:
    if request.kind == "full" or request.targets == "all-linear":
        return []
    if problems := unknown_targets(spec, request.targets):
        return problems
    if spec.model_type not in FUSED_ADAPTED_EXPERTS:
        return []
    fused = FEED_FORWARD[:2]
    given = [name.rpartition(".")[2] for name in request.targets]
    named = [name for name in fused if name in given]
    if len(named) != 1:
        return []
    other = fused[1 - fused.index(named[0])]
    what = f"{named[0]} without {other}, but the experts of {spec.checkpoint_type} hold both as one matrix"
    fix = f"Name both or neither: tuning.targets=[{','.join((*request.targets, other))}]"
    return [Problem("tuning.targets", what, fix)]


def _expert_problems(spec: ModelSpec, request: PlanRequest) -> list[Problem]:
    """PEFT 0.21 adapts fused experts neither with dropout nor with DoRA."""
    names = request.targets
    adapts = names == "all-linear" or any(name.rpartition(".")[2] in FEED_FORWARD for name in names)
    if request.kind == "full" or spec.model_type not in FUSED_ADAPTED_EXPERTS or not adapts:
        return []
    fix = "Leave it out, or adapt attention alone: tuning.targets=[q_proj,k_proj,v_proj,o_proj]"
    given = {"tuning.dropout": request.drops and "dropout", "tuning.variant": request.dora and "dora"}
    return [
        Problem(key, f"{what}, which adapters on the experts of {spec.checkpoint_type} do not know", fix)
        for key, what in given.items()
        if what
    ]


def _hybrid_problems(spec: ModelSpec, request: PlanRequest) -> list[Problem]:
    if spec.linear_attention is None:
        return []
    problems: list[Problem] = []
    if request.micro_batch not in ("auto", 1):
        what = (
            f"{request.micro_batch} rows, but linear attention ({spec.checkpoint_type}) reads on from one to the next"
        )
        problems.append(Problem("batch.micro_batch", what, "batch.micro_batch=auto"))
    count = request.gradient_checkpointing
    if count != "auto" and not isinstance(count, bool) and count < spec.num_layers and count % spec.period:
        below = count // spec.period * spec.period
        what = f"{count} layers, but {spec.checkpoint_type} repeats itself after {spec.period} different ones"
        problems.append(Problem("memory.gradient_checkpointing", what, f"Use {below} or {below + spec.period}."))
    return problems


def adapts_head(request: PlanRequest) -> bool:
    """Whether an adapter stands around the head, which then gives all logits at once."""
    if request.kind == "full" or request.targets == "all-linear":
        return False
    return any(name.rpartition(".")[2] == "lm_head" for name in request.targets)


def divisors(number: int) -> list[int]:
    """The numbers that divide it, in order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
