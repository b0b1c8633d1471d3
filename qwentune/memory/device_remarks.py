"""What is to be said of model and device beside a plan."""

from __future__ import annotations

from qwentune.facts.flex import flex_problem
from qwentune.facts.machines import NETWORK_BYTES_PER_SECOND, num_machines
from qwentune.facts.models import ModelSpec, length_remark
from qwentune.facts.present import spills
from qwentune.facts.towers import tower_remark
from qwentune.memory.judge import kernels_beside
from qwentune.memory.plan_request import Device
from qwentune.memory.settings import HostMemory
from qwentune.recipe import LoadedRecipe


def remarks(
    spec: ModelSpec,
    device: Device,
    max_tokens: int,
    where: str,
    *,
    attention: str = "auto",
    weights: str = "auto",
) -> list[str]:
    """What is to be said of model and device beside the plan; `where` says `data.max_tokens`.

    `attention` and `weights` are those of the recipe.
    """
    every = (
        tower_remark(spec),
        length_remark(spec, max_tokens, where),
        kernel_remark(spec, device),
        attention_remark(spec, device) if attention == "auto" else "",
        dtype_remark(device) if weights != "bf16" else "",
        rates_remark(device),
        ecc_remark(device),
        spill_remark(device),
    )
    return [remark for remark in every if remark]


def recipe_remarks(spec: ModelSpec, device: Device, loaded: LoadedRecipe, longest_row: int | None) -> list[str]:
    """What is to be said beside the plan of a recipe on the device; `longest_row` is None of data not rendered yet."""
    recipe, where = loaded.recipe, loaded.origins["data.max_tokens"]
    choices = {"attention": recipe.memory.attention, "weights": recipe.precision.weights}
    found = remarks(spec, device, recipe.data.max_tokens, where, **choices)
    if (together := num_machines(recipe.hardware.machines)) > 1:
        found.append(network_remark(together))
    return found if recipe.data.packing else [*found, row_remark(recipe.data.max_tokens, longest_row)]


def network_remark(together: int) -> str:
    """How fast the plan takes several machines to reach each other."""
    gigabits = NETWORK_BYTES_PER_SECOND * 8 / 1e9
    return (
        f"Times are for {together} machines that each send {gigabits:.0f} Gb/s to the others; nobody has measured it."
    )


def row_remark(max_tokens: int, longest_row: int | None) -> str:
    """By which length memory is judged where rows are not packed."""
    if longest_row is None:
        return (
            f"Memory is judged by data.max_tokens={max_tokens}. `qwentune preview` renders the data; then its longest "
            "example counts."
        )
    return f"Memory is judged by the longest example, {longest_row} tokens (data.max_tokens={max_tokens})."


def kernel_remark(spec: ModelSpec, device: Device) -> str:
    """How the plan takes linear attention to run, in words; empty where the model has none, or for a CPU."""
    if spec.linear_attention is None or isinstance(device, HostMemory):
        return ""
    kernels = kernels_beside(device)
    rule = "flash-linear-attention" if "fla" in kernels else "torch, which is slower and holds more"
    convolution = "causal-conv1d" if "causal_conv1d" in kernels else "torch"
    return (
        f"Linear attention is planned as what is installed here runs it: by {rule}; its convolution by {convolution}."
    )


def attention_remark(spec: ModelSpec, device: Device) -> str:
    """Why the plan's choice of attention is SDPA where the card would do more, in words; empty where it is not."""
    if spec.linear_attention is not None or isinstance(device, HostMemory) or not device.has_bf16:
        return ""
    problem = flex_problem(device)
    return "" if problem is None else f"Attention is planned as sdpa, for {problem.what}. {problem.fix}"


def dtype_remark(device: Device) -> str:
    """What it costs that a card has no bf16, in words; empty where it has, or for a CPU."""
    if isinstance(device, HostMemory) or device.has_bf16:
        return ""
    who = f"{device.name} has no bf16 and trains"
    if " + " in device.name:
        who = f"Not each of {device.name} has bf16; all train"
    rate = " at a fraction of the rate of 16 bits"
    if device.fp16_tflops is not None:
        rate = f" at {device.fp32_tflops:g} TFLOP/s, where fp16 would have {device.fp16_tflops:g}"
    return f"{who} in fp32: weights and activations take twice the bytes, and matrices are multiplied{rate}."


def rates_remark(device: Device) -> str:
    """Whose rates are taken for a card that is not in the table, in words; empty where it is there, or for a CPU."""
    if isinstance(device, HostMemory) or device.rates_of is None:
        return ""
    rate = f"{device.fp32_tflops:g} fp32" if device.bf16_tflops is None else f"{device.bf16_tflops:g} bf16"
    return (
        f"The rates of {device.name} are not known: those of {device.rates_of} are assumed ({rate} TFLOP/s, "
        f"{device.bandwidth_gb_per_second:g} GB/s). They decide the time, not whether it fits."
    )


def ecc_remark(device: Device) -> str:
    """What ECC takes of the GPU's memory, in words; empty where it takes nothing or is not known."""
    if isinstance(device, HostMemory) or device.has_hbm:
        return ""
    if device.has_ecc:
        return "ECC is on; it takes about a sixteenth of this GPU's memory, which is not in the bytes below."
    if device.has_ecc is None and "ECC" in device.source:
        read, gib = device.source.partition(";")[0], device.total_bytes / 2**30
        return f"{device.name} is planned with {gib:.2f} GiB ({read}); one that is here is judged by its own."
    return ""


def spill_remark(device: Device) -> str:
    """What a full GPU does here, in words; empty where it ends the run."""
    if isinstance(device, HostMemory) or not spills():
        return ""
    return (
        "Under Windows a full GPU spills into host memory and slows down instead of failing: "
        "what fits is what the plan says, not what runs."
    )
