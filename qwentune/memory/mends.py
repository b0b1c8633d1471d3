"""The cheapest changes to a recipe that make it fit; each was evaluated before it is offered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.facts.launch import Sharding, uses_deepspeed
from qwentune.memory.closed_form.host_memory import disk_bytes
from qwentune.memory.media_use import most_media
from qwentune.memory.plan_request import Device, PlanRequest, request_problems
from qwentune.memory.search import Candidate, leanest, needed_host_bytes, shortages

_MAX_MENDS = 6
_FEWEST_TOKENS = 256
_FEWEST_PATCHES = 256  # of a picture: 224 pixels square
NUM_GPUS = (2, 4, 8, 16)  # that are offered
_OFFLOADING: tuple[Sharding, ...] = ("zero2-offload", "zero3-offload")


@dataclass(frozen=True, slots=True)
class Mend:
    """A change that fits: in words, in bytes saved, and as overrides to paste after the recipe.

    Saved are bytes of what is short: the device at the peak, the host, or the disk. Both sides are as lean as can be; a
    plan then spends what was saved on speed.
    """

    change: str
    saves_bytes: int
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Change:
    text: str
    overrides: tuple[str, ...]
    apply: Callable[[PlanRequest], PlanRequest]


def find_mends(spec: ModelSpec, device: Device, request: PlanRequest, current: Candidate) -> tuple[Mend, ...]:
    """Up to six mends in the order of what they cost the user; empty where nothing known helps.

    A change is offered alone where that suffices, else together with those that cost nothing but speed, else in
    pairs.
    """
    short_of = shortages(spec, device, request, current)[0]
    needed = _needed(spec, device, request, current, short_of)
    free = list(_free_changes(request))
    costly = list(_costly_changes(spec, device, request))
    mends: list[Mend] = []

    def offer(*ladder: Sequence[_Change]) -> bool:
        """Try every combination of one variant per rung, mildest first; keep the first that fits."""
        for changes in _variants(ladder):
            keys = [override.split("=")[0] for change in changes for override in change.overrides]
            if len(set(keys)) < len(keys):  # two changes of one key
                continue
            mended = request
            for change in changes:
                mended = change.apply(mended)
            if request_problems(spec, mended):  # the libraries cannot run it
                continue
            found = leanest(spec, device, mended)
            if not shortages(spec, device, mended, found):
                text = ", ".join(change.text for change in changes)
                overrides = tuple(override for change in changes for override in change.overrides)
                saved = max(0, needed - _needed(spec, device, mended, found, short_of))
                mends.append(Mend(text, saved, overrides))
                return True
        return False

    def offer_with_free(*rungs: Sequence[_Change]) -> bool:
        return any(offer(*([change] for change in free[:count]), *rungs) for count in range(len(free) + 1))

    alone = [offer([change]) for change in free]
    if not any(alone):
        offer_with_free()
    insufficient = [variants for variants in costly if not offer_with_free(variants)]
    for pair in combinations(insufficient, 2):
        if len(mends) < _MAX_MENDS:
            offer_with_free(*pair)
    return tuple(mends[:_MAX_MENDS])


def _needed(spec: ModelSpec, device: Device, request: PlanRequest, candidate: Candidate, place: str) -> int:
    if place == "disk":
        return disk_bytes(spec, candidate.settings, request.keep)
    return needed_host_bytes(spec, device, candidate) if place == "host" else candidate.peak_bytes


def _variants(ladder: Sequence[Sequence[_Change]]) -> Iterator[tuple[_Change, ...]]:
    if not ladder:
        yield ()
        return
    for rest in _variants(ladder[1:]):
        for change in ladder[0]:
            yield (change, *rest)


def _free_changes(request: PlanRequest) -> Iterator[_Change]:
    """Pins whose release changes speed alone."""
    if request.loss == "full":
        yield _Change(
            "compute the loss in chunks, at trained positions only",
            ("memory.loss=supervised",),
            lambda asked: replace(asked, loss="supervised"),
        )
    if request.gradient_checkpointing not in ("auto", True):
        yield _Change(
            "recompute activations in the backward pass",
            ("memory.gradient_checkpointing=true",),
            lambda asked: replace(asked, gradient_checkpointing=True),
        )
    if request.micro_batch not in ("auto", 1):
        yield _Change(
            "let the plan choose fewer rows per forward pass",
            ("batch.micro_batch=auto",),
            lambda asked: replace(asked, micro_batch="auto"),
        )
    if request.sharding not in ("auto", "none"):
        yield _Change(
            "let the plan choose what the GPUs share",
            ("hardware.launch=auto",),
            lambda asked: replace(asked, sharding="auto"),
        )
    if request.attention == "eager":
        yield _Change(
            "use an attention kernel that holds no scores",
            ("memory.attention=auto",),
            lambda asked: replace(asked, attention="auto"),
        )


def _costly_changes(spec: ModelSpec, device: Device, request: PlanRequest) -> Iterator[list[_Change]]:
    """Changes that cost exactness, quality, text or hardware, in that order; variants of one are listed together."""
    if request.keep > 1 and request.disk_free_bytes is not None:
        yield [_Change("keep one checkpoint", ("output.keep=1",), lambda asked: replace(asked, keep=1))]
    if request.answers:
        yield [
            _Change(
                "answer no prompts while training",
                ("output.samples=0", "output.best=null"),
                lambda asked: replace(asked, answers=False),
            )
        ]
    if isinstance(device, GpuSpec) and request.kind == "full" and request.sharding not in ("auto", *_OFFLOADING):
        yield [_offloaded(launch) for launch in _OFFLOADING]
    is_sharded = request.sharding not in ("auto", "none", "ddp")
    takes_8_bits = request.sharding == "auto" or not uses_deepspeed(request.sharding)
    if request.kind == "full" and request.optimizer_state != "8bit" and takes_8_bits:
        yield [
            _Change(
                "hold the optimizer's moments in 8 bits",
                ("precision.optimizer_state=8bit",),
                lambda asked: replace(asked, optimizer_state="8bit"),
            )
        ]
    has_bf16 = not isinstance(device, GpuSpec) or device.has_bf16
    if has_bf16 and (request.weights == "fp32" or (request.weights == "auto" and not isinstance(device, GpuSpec))):
        yield [
            _Change(
                "hold the weights in bf16",
                ("precision.weights=bf16",),
                lambda asked: replace(asked, weights="bf16"),
            )
        ]
    if request.kind == "full":
        yield [
            _Change(
                "train adapters (LoRA) instead of all weights",
                ("tuning.kind=lora",),
                lambda asked: replace(asked, kind="lora"),
            )
        ]
    if request.kind != "qlora":
        yield [
            _Change(
                "train adapters on 4-bit weights (QLoRA)",
                ("tuning.kind=qlora", *(("hardware.launch=auto",) if is_sharded else ())),
                lambda asked: replace(asked, kind="qlora", sharding="auto" if is_sharded else asked.sharding),
            )
        ]
    halved = [request.max_tokens >> halvings for halvings in range(1, 16)]
    if fewer := [tokens for tokens in halved if tokens >= _FEWEST_TOKENS]:
        yield [shorter(spec, request, tokens) for tokens in fewer]
    if not isinstance(device, GpuSpec) or request.num_machines > 1:
        return
    if request.kind != "qlora":
        yield [_more_gpus(count) for count in NUM_GPUS if count > request.num_gpus]
    else:  # whose weights are not shared
        yield [_unquantised(count) for count in NUM_GPUS if count >= request.num_gpus]


def shorter(spec: ModelSpec, request: PlanRequest, max_tokens: int) -> _Change:
    """Shorter rows, with pictures and videos that are as much smaller, so that they still stand in them.

    Only the length of rows bounds what they show: rows are filled up again where pictures alone are smaller. Nothing is
    known of the rows that the change makes.
    """
    text, overrides = f"shorten examples to {max_tokens} tokens", [f"data.max_tokens={max_tokens}"]
    largest, vision = request.largest, spec.tower and spec.tower.vision
    if request.towers is not None and largest is not None and vision is not None:
        patches = largest.largest * max_tokens // request.max_tokens
        pixels, what = patches * vision.patch**2, "pictures to"
        if largest.is_video:  # both, for of some families all frames together are bounded, and fewer would be larger
            frames = max(vision.temporal, largest.num_frames * max_tokens // request.max_tokens)
            pixels, what = pixels // -(-frames // vision.temporal), f"videos to {frames} frames of"
            overrides.append(f"data.media.max_frames={frames}")
        if largest.is_video or patches >= _FEWEST_PATCHES:
            text += f", {what} {pixels} pixels"
            overrides.append(f"data.media.max_pixels={pixels}")

    def apply(asked: PlanRequest) -> PlanRequest:
        towers = asked.towers and most_media(spec, asked.towers, max_tokens)
        return replace(asked, max_tokens=max_tokens, towers=towers, largest=None)

    return _Change(text, tuple(overrides), apply)


def _offloaded(launch: Sharding) -> _Change:
    return _Change(
        "hold the optimizer's states in host memory",
        (f"hardware.launch={launch}",),
        lambda asked: replace(asked, sharding=launch),
    )


def _unquantised(count: int) -> _Change:
    return _Change(
        f"train adapters on 16-bit weights (LoRA) that {count} GPUs share",
        ("tuning.kind=lora", f"hardware.count={count}", "hardware.launch=fsdp2"),
        lambda asked: replace(asked, kind="lora", num_gpus=count, sharding="fsdp2"),
    )


def _more_gpus(count: int) -> _Change:
    return _Change(
        f"share the weights among {count} GPUs",
        (f"hardware.count={count}", "hardware.launch=fsdp2"),
        lambda asked: replace(asked, num_gpus=count, sharding="fsdp2"),
    )
