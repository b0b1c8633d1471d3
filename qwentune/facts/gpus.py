"""The table of GPUs: usable memory as torch reports it, and the rates that bound a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwentune.errors import Problem, UsageError, nearest

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU.

    `total_bytes` is torch's `total_memory` on Linux, a little below the number on the box. `bf16_tflops` is the dense
    tensor rate with fp32 accumulation, None where the hardware has no bf16; `fp32_tflops` the plain fp32 rate;
    `bandwidth_gb_per_second` counts 10^9 bytes. `has_ecc` says whether a card that is here has ECC on; None for a row
    of the table, whose memory was read as `source` says. `fp16_tflops` is known of cards without bf16 alone, and says
    what they lose by it. `is_here` says that a process of this machine would get it.
    """

    name: str
    total_bytes: int
    bf16_tflops: float | None
    fp32_tflops: float
    bandwidth_gb_per_second: float
    compute_capability: tuple[int, int]
    source: str
    has_ecc: bool | None = None
    fp16_tflops: float | None = None
    is_here: bool = False

    @property
    def has_hbm(self) -> bool:
        """Whether its memory is stacked (HBM), of which ECC takes nothing; it takes a sixteenth of GDDR."""
        return self.compute_capability in ((7, 0), (8, 0), (9, 0), (10, 0), (10, 3))

    @property
    def has_bf16(self) -> bool:
        """Whether the hardware computes in bf16."""
        return self.bf16_tflops is not None

    @property
    def link_gb_per_second(self) -> float:
        """10^9 bytes per second between the GPU and pinned host memory, each way.

        Source: PCIe 3, 4 and 5 with 16 lanes carry 16, 32 and 64; four fifths are taken. Which of them a card has is
        told by its architecture (unverified for each card, and a slot may have fewer lanes).
        """
        major, _ = self.compute_capability
        return 0.8 * (16.0 if major < 8 else 32.0 if major == 8 else 64.0)


# Memory: "banner" a start-up banner of a training run that names the card, "OOM" an out-of-memory message of torch,
# "unverified" by analogy. Rates: all from the vendors' data sheets written from memory.
# GeForce cards run bf16 with fp32 accumulation at half the rate printed for fp16 accumulation.
# fmt: off
_ROWS: tuple[tuple[str, float, float | None, float, float, tuple[int, int], str], ...] = (
    # name            GiB     bf16    fp32   GB/s    capability  memory
    ("gtx-1650",       3.8,   None,    3.0,   128.0, (7, 5),   "unverified"),
    ("t4",            14.563, None,    8.1,   320.0, (7, 5),   "banner, ECC on"),
    ("v100-16gb",     15.77,  None,   15.7,   900.0, (7, 0),   "unverified"),
    ("v100-32gb",     31.74,  None,   15.7,   900.0, (7, 0),   "unverified"),
    ("rtx-3060",      11.747, 25.5,   12.7,   360.0, (8, 6),   "banner, 12 GB card"),
    ("rtx-3080",       9.78,  59.5,   29.8,   760.0, (8, 6),   "OOM, 10 GB card"),
    ("rtx-3080-12gb", 11.7,   61.3,   30.6,   912.0, (8, 6),   "unverified"),
    ("rtx-3090",      23.677, 71.0,   35.6,   936.0, (8, 6),   "banner"),
    ("rtx-4070",      11.7,   58.3,   29.1,   504.0, (8, 9),   "unverified"),
    ("rtx-4080",      15.6,   97.5,   48.7,   717.0, (8, 9),   "unverified on Linux"),
    ("rtx-4080-super", 15.6, 104.4,   52.2,   736.0, (8, 9),   "unverified, as the 4080"),
    ("rtx-4090",      23.51, 165.2,   82.6,  1008.0, (8, 9),   "banner"),
    ("rtx-5070-ti",   15.45,  87.9,   43.9,   896.0, (12, 0),  "OOM of a 16 GB card that it does not name"),
    ("rtx-5080",      15.45, 112.6,   56.3,   960.0, (12, 0),  "OOM of a 16 GB card that it does not name"),
    ("rtx-5090",      31.342, 209.5, 104.8,  1792.0, (12, 0),  "banner"),
    ("a10g",          21.988, 70.0,   35.0,   600.0, (8, 6),   "banner"),
    ("a6000",         47.431, 154.8,  38.7,   768.0, (8, 6),   "banner, ECC off (44.427 with ECC)"),
    ("rtx-6000-ada",  44.43, 364.2,   91.1,   960.0, (8, 9),   "an issue thread, ECC on"),
    ("l4",            22.161, 121.0,  30.3,   300.0, (8, 9),   "banner"),
    ("l40s",          44.39, 362.0,   91.6,   864.0, (8, 9),   "banner"),
    ("a100-40gb",     39.494, 312.0,  19.5,  1555.0, (8, 0),   "banner"),
    ("a100-80gb",     79.151, 312.0,  19.5,  2039.0, (8, 0),   "banner, SXM"),
    ("h100-80gb",     79.179, 989.0,  66.9,  3350.0, (9, 0),   "banner, SXM"),
    ("h20",           95.0,  148.0,   44.0,  4000.0, (9, 0),   "OOM that does not name the card, 96 GB"),
    ("h200",         139.7,  989.0,   66.9,  4800.0, (9, 0),   "banner"),
    ("b200",         178.35, 2250.0,  75.0,  8000.0, (10, 0),  "OOM on eight B200"),
)
# fmt: on
_FP16_TFLOPS = {"gtx-1650": 6.0, "t4": 65.0, "v100-16gb": 125.0, "v100-32gb": 125.0}  # of cards without bf16

GPUS: Mapping[str, GpuSpec] = {
    name: GpuSpec(
        name,
        int(gib * _GIB),
        bf16,
        fp32,
        bandwidth,
        capability,
        f"memory: {memory}; rates: vendor's data sheet, from memory",
        fp16_tflops=_FP16_TFLOPS.get(name),
    )
    for name, gib, bf16, fp32, bandwidth, capability, memory in _ROWS
}
"""Every known GPU by its name."""


def weakest(cards: Sequence[GpuSpec]) -> GpuSpec:
    """What every rank can count on where each has one of these cards; the name names all kinds of them."""
    names = list(dict.fromkeys(card.name for card in cards))
    smallest = min(cards, key=lambda card: card.total_bytes)
    rates = [card.bf16_tflops for card in cards if card.bf16_tflops is not None]
    return replace(
        smallest,
        name=" + ".join(names),
        bf16_tflops=min(rates) if len(rates) == len(cards) else None,
        fp32_tflops=min(card.fp32_tflops for card in cards),
        bandwidth_gb_per_second=min(card.bandwidth_gb_per_second for card in cards),
        compute_capability=min(card.compute_capability for card in cards),
        fp16_tflops=smallest.fp16_tflops if len(names) == 1 else None,
    )


def gpu_spec(name: str) -> GpuSpec:
    """The facts of a GPU, its name in any case.

    Raises:
        UsageError: an unknown name (names the nearest).
    """
    key = name.lower()
    if key in GPUS:
        return GPUS[key]
    family = [known for known in GPUS if known.startswith(key)]
    suggestion = f" Did you mean '{family[0]}'?" if family else nearest(key, GPUS)
    raise UsageError(Problem("hardware.gpu", f"'{name}' is not a known GPU.{suggestion}", "`qwentune gpus` lists all."))
