"""The table of GPUs: usable memory as torch reports it, and the rates that bound a training step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwentune.errors import Problem, UsageError

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU.

    `total_bytes` is torch's `total_memory` on Linux, a little below the number on the box. `bf16_tflops` is the dense
    tensor rate with fp32 accumulation, None where the hardware has no bf16; `fp32_tflops` the plain fp32 rate;
    `bandwidth_gb_per_second` counts 10^9 bytes. `has_ecc` says whether a card that is here has ECC on; None for a row
    of the table, whose memory was read as `source` says. `fp16_tflops` is known of cards without bf16 alone, and says
    what they lose by it. `is_here` says that a process of this machine would get it. `rates_of` names the row whose
    rates are assumed for a card that is not in the table.
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
    rates_of: str | None = None

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
# "unverified" by analogy, of workstation cards from Ada on and of data-centre cards with GDDR as if ECC were on, which
# takes a sixteenth. Rates: all from the vendors' data sheets written from memory.
# GeForce cards run bf16 (Turing: fp16) with fp32 accumulation at half the rate printed for fp16 accumulation.
# Older than Volta is none: torch's builds of today hold no code for them.
# fmt: off
_ROWS: tuple[tuple[str, float, float | None, float, float, tuple[int, int], str], ...] = (
    # name            GiB     bf16    fp32   GB/s    capability  memory
    ("gtx-1650",       3.8,   None,    3.0,   128.0, (7, 5),   "unverified"),
    ("gtx-1650-super", 3.8,   None,    4.4,   192.0, (7, 5),   "unverified"),
    ("gtx-1660",       5.8,   None,    5.0,   192.0, (7, 5),   "unverified, as the RTX 2060"),
    ("gtx-1660-super", 5.8,   None,    5.0,   336.0, (7, 5),   "unverified, as the RTX 2060"),
    ("gtx-1660-ti",    5.8,   None,    5.4,   288.0, (7, 5),   "unverified, as the RTX 2060"),
    ("rtx-2060",       5.79,  None,    6.5,   336.0, (7, 5),   "OOM, from memory: unverified"),
    ("rtx-2060-12gb", 11.7,   None,    7.2,   336.0, (7, 5),   "unverified, as the 3060"),
    ("rtx-2060-super", 7.78,  None,    7.2,   448.0, (7, 5),   "unverified, as the 2070"),
    ("rtx-2070",       7.78,  None,    7.5,   448.0, (7, 5),   "OOM, from memory: unverified"),
    ("rtx-2070-super", 7.78,  None,    9.1,   448.0, (7, 5),   "unverified, as the 2070"),
    ("rtx-2080",       7.78,  None,   10.1,   448.0, (7, 5),   "unverified, as the 2070"),
    ("rtx-2080-super", 7.78,  None,   11.2,   496.0, (7, 5),   "unverified, as the 2070"),
    ("rtx-2080-ti",   10.75,  None,   13.4,   616.0, (7, 5),   "OOM, from memory: unverified"),
    ("titan-rtx",     23.6,   None,   16.3,   672.0, (7, 5),   "unverified, as the 3090"),
    ("quadro-rtx-4000", 7.78, None,    7.1,   416.0, (7, 5),   "unverified, as the RTX 2070"),
    ("quadro-rtx-5000", 15.7, None,   11.2,   448.0, (7, 5),   "unverified"),
    ("quadro-rtx-6000", 23.6, None,   16.3,   672.0, (7, 5),   "unverified, as the 3090"),
    ("quadro-rtx-8000", 47.4, None,   16.3,   672.0, (7, 5),   "unverified, as the A6000"),
    ("t4",            14.563, None,    8.1,   320.0, (7, 5),   "banner, ECC on"),
    ("v100-16gb",     15.77,  None,   15.7,   900.0, (7, 0),   "unverified"),
    ("v100-32gb",     31.74,  None,   15.7,   900.0, (7, 0),   "unverified"),
    ("rtx-3050",       7.78,  18.2,    9.1,   224.0, (8, 6),   "unverified, as the 3070"),
    ("rtx-3050-6gb",   5.79,  13.5,    6.8,   168.0, (8, 6),   "unverified, as the 2060"),
    ("rtx-3060",      11.747, 25.5,   12.7,   360.0, (8, 6),   "banner, 12 GB card"),
    ("rtx-3060-ti",    7.78,  32.4,   16.2,   448.0, (8, 6),   "unverified, as the 3070"),
    ("rtx-3070",       7.78,  40.6,   20.3,   448.0, (8, 6),   "OOM, from memory: unverified"),
    ("rtx-3070-ti",    7.78,  43.5,   21.7,   608.0, (8, 6),   "unverified, as the 3070"),
    ("rtx-3080",       9.78,  59.5,   29.8,   760.0, (8, 6),   "OOM, 10 GB card"),
    ("rtx-3080-12gb", 11.7,   61.3,   30.6,   912.0, (8, 6),   "unverified"),
    ("rtx-3080-ti",   11.7,   68.2,   34.1,   912.0, (8, 6),   "unverified, as the 3060"),
    ("rtx-3090",      23.677, 71.0,   35.6,   936.0, (8, 6),   "banner"),
    ("rtx-3090-ti",   23.67,  80.0,   40.0,  1008.0, (8, 6),   "unverified, as the 3090"),
    ("rtx-4060",       7.62,  30.2,   15.1,   272.0, (8, 9),   "OOM, from memory: unverified"),
    ("rtx-4060-ti-8gb", 7.62, 44.1,   22.1,   288.0, (8, 9),   "unverified, as the 4060"),
    ("rtx-4060-ti-16gb", 15.6, 44.1,  22.1,   288.0, (8, 9),   "unverified, as the 4080"),
    ("rtx-4070",      11.7,   58.3,   29.1,   504.0, (8, 9),   "unverified"),
    ("rtx-4070-super", 11.7,  71.0,   35.5,   504.0, (8, 9),   "unverified, as the 4070"),
    ("rtx-4070-ti",   11.7,   80.2,   40.1,   504.0, (8, 9),   "unverified, as the 4070"),
    ("rtx-4070-ti-super", 15.6, 88.2, 44.1,   672.0, (8, 9),   "unverified, as the 4080"),
    ("rtx-4080",      15.6,   97.5,   48.7,   717.0, (8, 9),   "unverified on Linux"),
    ("rtx-4080-super", 15.6, 104.4,   52.2,   736.0, (8, 9),   "unverified, as the 4080"),
    ("rtx-4090",      23.51, 165.2,   82.6,  1008.0, (8, 9),   "banner"),
    ("rtx-4090-d",    23.5,  147.1,   73.5,  1008.0, (8, 9),   "unverified, as the 4090"),
    ("rtx-5050",       7.5,   26.3,   13.2,   320.0, (12, 0),  "unverified"),
    ("rtx-5060",       7.5,   38.4,   19.2,   448.0, (12, 0),  "unverified"),
    ("rtx-5060-ti-8gb", 7.5,  47.4,   23.7,   448.0, (12, 0),  "unverified"),
    ("rtx-5060-ti-16gb", 15.45, 47.4, 23.7,   448.0, (12, 0),  "unverified, as the 5080"),
    ("rtx-5070",      11.5,   61.7,   30.9,   672.0, (12, 0),  "unverified"),
    ("rtx-5070-ti",   15.45,  87.9,   43.9,   896.0, (12, 0),  "OOM of a 16 GB card that it does not name"),
    ("rtx-5080",      15.45, 112.6,   56.3,   960.0, (12, 0),  "OOM of a 16 GB card that it does not name"),
    ("rtx-5090",      31.342, 209.5, 104.8,  1792.0, (12, 0),  "banner"),
    ("rtx-5090-d",    31.34, 209.5,  104.8,  1792.0, (12, 0),  "unverified, as the 5090; its limit is of int8"),
    ("a2000-6gb",      5.79,  31.9,    8.0,   288.0, (8, 6),   "unverified"),
    ("a2000-12gb",    11.7,   31.9,    8.0,   288.0, (8, 6),   "unverified"),
    ("a4000",         15.7,   76.7,   19.2,   448.0, (8, 6),   "unverified, ECC off"),
    ("a4500",         19.6,   94.6,   23.7,   640.0, (8, 6),   "unverified, ECC off"),
    ("a5000",         23.67, 111.1,   27.8,   768.0, (8, 6),   "unverified, ECC off"),
    ("a5500",         23.67, 136.4,   34.1,   768.0, (8, 6),   "unverified, ECC off"),
    ("a6000",         47.431, 154.8,  38.7,   768.0, (8, 6),   "banner, ECC off (44.427 with ECC)"),
    ("rtx-2000-ada",  14.6,   48.0,   12.0,   224.0, (8, 9),   "unverified, ECC on"),
    ("rtx-4000-ada",  18.4,  106.9,   26.7,   360.0, (8, 9),   "unverified, ECC on"),
    ("rtx-4500-ada",  22.1,  158.5,   39.6,   432.0, (8, 9),   "unverified, ECC on, as the L4"),
    ("rtx-5000-ada",  29.6,  261.1,   65.3,   576.0, (8, 9),   "unverified, ECC on"),
    ("rtx-5880-ada",  44.4,  277.3,   69.3,   960.0, (8, 9),   "unverified, ECC on, as the 6000 Ada"),
    ("rtx-6000-ada",  44.43, 364.2,   91.1,   960.0, (8, 9),   "an issue thread, ECC on"),
    ("rtx-pro-2000",  14.5,   68.0,   17.0,   288.0, (12, 0),  "unverified, ECC on"),
    ("rtx-pro-4000",  22.0,  187.6,   46.9,   672.0, (12, 0),  "unverified, ECC on"),
    ("rtx-pro-4500",  29.5,  219.6,   54.9,   896.0, (12, 0),  "unverified, ECC on"),
    ("rtx-pro-5000-48gb", 44.3, 294.8, 73.7, 1344.0, (12, 0),  "unverified, ECC on"),
    ("rtx-pro-5000-72gb", 66.5, 294.8, 73.7, 1344.0, (12, 0),  "unverified, ECC on"),
    ("rtx-pro-6000",  94.97, 503.8,  126.0,  1792.0, (12, 0),  "OOM, from memory: unverified"),
    ("a10",           21.99, 125.0,   31.2,   600.0, (8, 6),   "unverified, ECC on, as the A10G"),
    ("a10g",          21.988, 70.0,   35.0,   600.0, (8, 6),   "banner"),
    ("a16",           14.56,  17.9,    4.5,   200.0, (8, 6),   "unverified, ECC on; one of the four on a board"),
    ("a30",           23.5,  165.0,   10.3,   933.0, (8, 0),   "unverified"),
    ("a40",           44.4,  149.7,   37.4,   696.0, (8, 6),   "unverified, ECC on, as the A6000"),
    ("l4",            22.161, 121.0,  30.3,   300.0, (8, 9),   "banner"),
    ("l20",           44.39, 119.5,   59.8,   864.0, (8, 9),   "unverified, ECC on, as the L40S"),
    ("l40",           44.39, 181.0,   90.5,   864.0, (8, 9),   "unverified, ECC on, as the L40S"),
    ("l40s",          44.39, 362.0,   91.6,   864.0, (8, 9),   "banner"),
    ("a100-40gb",     39.494, 312.0,  19.5,  1555.0, (8, 0),   "banner"),
    ("a100-80gb",     79.151, 312.0,  19.5,  2039.0, (8, 0),   "banner, SXM"),
    ("a800-40gb",     39.49, 312.0,   19.5,  1555.0, (8, 0),   "unverified, as the A100"),
    ("a800-80gb",     79.15, 312.0,   19.5,  2039.0, (8, 0),   "unverified, as the A100"),
    ("h100-80gb",     79.179, 989.0,  66.9,  3350.0, (9, 0),   "banner, SXM"),
    ("h100-pcie-80gb", 79.18, 756.0,  51.2,  2000.0, (9, 0),   "unverified, as the SXM card"),
    ("h100-nvl-94gb", 93.1,  835.0,   60.0,  3900.0, (9, 0),   "OOM, from memory: unverified"),
    ("h800-80gb",     79.18, 989.0,   66.9,  3350.0, (9, 0),   "unverified, as the H100"),
    ("h20",           95.0,  148.0,   44.0,  4000.0, (9, 0),   "OOM that does not name the card, 96 GB"),
    ("h20-141gb",    139.7,  148.0,   44.0,  4800.0, (9, 0),   "unverified, as the H200"),
    ("h200",         139.7,  989.0,   66.9,  4800.0, (9, 0),   "banner"),
    ("h200-nvl",     139.7,  835.0,   60.0,  4800.0, (9, 0),   "unverified, as the SXM card"),
    ("gh200-96gb",    94.5,  989.0,   66.9,  4000.0, (9, 0),   "OOM, from memory: unverified"),
    ("gh200-144gb",  139.7,  989.0,   66.9,  4900.0, (9, 0),   "unverified, as the H200"),
    ("b200",         178.35, 2250.0,  75.0,  8000.0, (10, 0),  "OOM on eight B200"),
    ("gb200",        178.35, 2450.0,  80.0,  8000.0, (10, 0),  "unverified, as the B200"),
    ("b300",         267.0,  2250.0,  75.0,  8000.0, (10, 3),  "unverified, 288 GB card"),
    ("gb300",        267.0,  2500.0,  80.0,  8000.0, (10, 3),  "unverified, as the B300"),
)
# fmt: on
# Of cards without bf16: tensor cores with fp32 accumulation, of GeForce at half rate; GTX cards have none.
_FP16_TFLOPS = {
    **{"gtx-1650": 6.0, "gtx-1650-super": 8.9, "gtx-1660": 10.0, "gtx-1660-super": 10.0, "gtx-1660-ti": 10.9},
    **{"rtx-2060": 25.8, "rtx-2060-12gb": 28.7, "rtx-2060-super": 28.7, "rtx-2070": 29.9, "rtx-2070-super": 36.3},
    **{"rtx-2080": 40.3, "rtx-2080-super": 44.6, "rtx-2080-ti": 53.8, "titan-rtx": 130.5},
    **{"quadro-rtx-4000": 57.0, "quadro-rtx-5000": 89.2, "quadro-rtx-6000": 130.5, "quadro-rtx-8000": 130.5},
    **{"t4": 65.0, "v100-16gb": 125.0, "v100-32gb": 125.0},
}

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


# What people and drivers write beside a card's name, and what makes no difference to the table.
_UNSAID = re.compile(
    "nvidia|geforce|tesla|gpu|graphics|card|rtx|gtx|generation|edition|workstation|server|blackwell|max|q"
    "|sxm[2-9]?|hbm[2-9]e?|ac"
)
_MEMORY = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(gib|gb)", re.IGNORECASE)
_MOST_GIB = 4096
_Row = tuple[GpuSpec, frozenset[str], frozenset[str]]  # with the words of its name, those of the memory apart
ANY_CARD = "any card by its memory, as in 24GiB"


def gpu_spec(name: str) -> GpuSpec:
    """The facts of a GPU, by its name as people write it, in any case; or of any card by its memory, such as `24GiB`.

    Raises:
        UsageError: an unknown name, or one of cards that differ in memory (names those that may be meant).
    """
    if (known := GPUS.get(name.lower())) is not None:
        return known
    if told := _MEMORY.fullmatch(name.strip()):
        return _of_memory(told)
    asked, sizes = _words(name)
    rows = [(spec, *_words(spec.name)) for spec in GPUS.values()]
    if not any(words == asked for _, words, _ in rows):
        asked -= {"pcie"}  # which tells cards of few names apart
    sized = [(spec, words, own) for spec, words, own in rows if all(_has(spec, size) for size in sizes)]
    found = [spec for spec, words, own in rows if (words, own) == (asked, sizes)]
    found = found or [spec for spec, words, _ in sized if words == asked]
    if len(found) == 1:
        return found[0]
    # Of another memory none is offered: what is planned for it would say nothing of the card that is meant.
    if asked & {"laptop", "mobile"}:
        sized = []
    meant = found or [spec for spec, words, _ in sized if asked and asked < words] or _misspelt(name, asked, sized)
    what = f"'{name}' may be {len(found)} GPUs." if found else f"'{name}' is not a known GPU."
    if meant:
        offered = " or ".join(f"'{spec.name}'" for spec in meant[:6])
        what += f" Did you mean {offered}?"
    raise UsageError(Problem("hardware.gpu", what, f"`qwentune gpus` lists all; {ANY_CARD}."))


def named_by_driver(name: str) -> list[GpuSpec]:
    """The rows of which a driver's name for a card holds the most words, whatever their memory; none of a new card."""
    said, _ = _words(name)
    rows = [(spec, words) for spec in GPUS.values() if (words := _words(spec.name)[0]) <= said]
    most = max((len(words) for _, words in rows), default=0)
    return [spec for spec, words in rows if len(words) == most]


def _words(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words that tell a card from others, and those of its memory (`24gb`)."""
    name = re.sub(r"(?<!\d)(\d{1,6}) ?g(?:i?b)?\b", r" \1gb ", name.lower())
    name = re.sub(r"\b(rtx|gtx|quadro|titan|pro)(?=\w)", r"\1 ", name)
    words = re.sub(r"(?<=\d\d)(ti|super|ada|d)(super)?\b", r" \1 \2", re.sub(r"[^a-z0-9.]+", " ", name)).split()
    sizes = frozenset(word for word in words if re.fullmatch(r"\d{1,6}gb", word))
    return frozenset(word for word in words if word not in sizes and not _UNSAID.fullmatch(word)), sizes


def _has(spec: GpuSpec, size: str) -> bool:
    """Whether a card is sold with so much memory: what torch reports is up to an eighth less."""
    return 0.875 * int(size[:-2]) < spec.total_bytes / _GIB <= int(size[:-2])


def _misspelt(name: str, asked: frozenset[str], rows: Sequence[_Row]) -> list[GpuSpec]:
    """The cards whose name is nearly the one asked for and holds the same numbers, but for that of its memory.

    Where there is none, the first of those whose name begins so, if all have the same memory.
    """
    kin = [spec for spec, words, _ in rows if _numbers(words) == _numbers(asked)]
    names = [_without_memory(spec.name) for spec in kin]
    near = difflib.get_close_matches(_without_memory(name.lower()), names, n=1, cutoff=0.75)
    if near:
        return [spec for spec, own in zip(kin, names, strict=True) if own in near]
    begun = [spec for spec, _, _ in rows if asked and spec.name.startswith(name.lower())]
    sizes = [spec.total_bytes for spec in begun]
    return begun[:1] if sizes and max(sizes) - min(sizes) < _GIB / 2 else []


def _without_memory(name: str) -> str:
    return re.sub(r"[- ]\d+gb$", "", name)


def _numbers(words: frozenset[str]) -> list[str]:
    return sorted(re.findall(r"\d+", " ".join(words)))


def _of_memory(told: re.Match[str]) -> GpuSpec:
    """A card of which only the memory is known, in GiB or in GB of 10^9 bytes.

    Its rates are those of the slowest card with bf16 among the nearest in memory.
    """
    unit = "GiB" if told[2].lower() == "gib" else "GB"
    num_bytes = int(float(told[1]) * (_GIB if unit == "GiB" else 10**9))
    if not _GIB <= num_bytes <= _MOST_GIB * _GIB:
        raise UsageError(Problem("", f"a GPU has between 1GiB and {_MOST_GIB}GiB of memory, not {told[0]}"))
    with_bf16 = [spec for spec in GPUS.values() if spec.has_bf16]
    apart = {spec.name: abs(spec.total_bytes - num_bytes) for spec in with_bf16}
    least = min(apart.values())
    kin = [spec for spec in with_bf16 if apart[spec.name] <= least + _GIB]
    slowest = min(kin, key=lambda spec: spec.bf16_tflops or 0.0)
    own = {"name": f"{told[1]}{unit}", "total_bytes": num_bytes, "source": "memory: as given"}
    return replace(slowest, **own, rates_of=slowest.name)
