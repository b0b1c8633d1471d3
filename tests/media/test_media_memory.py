"""Memory of models that see or hear: parameters, the trace against real steps on a CPU, the closed form against it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig

from qwentune.data.layout.row_media import RowMedia
from qwentune.data.layout.tower_inputs import tower_inputs
from qwentune.data.media.limits import media_limits
from qwentune.data.media.sounds import mel_frames
from qwentune.data.media.sounds import num_pads as num_pads_of
from qwentune.data.media.videos import Film, frames_taken, video_size
from qwentune.errors import UsageError
from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.media import FAMILIES
from qwentune.facts.models import MODELS, model_spec, whole_config_of
from qwentune.facts.published_media import NOT_TAKEN
from qwentune.memory import PlanRequest, RunPlan, make_plan
from qwentune.memory.closed_form.phases import phases
from qwentune.memory.judge import device_of, judge_recipe
from qwentune.memory.media_use import expects_media, most_media, tower_use
from qwentune.memory.mends import shorter
from qwentune.memory.settings import Settings, TowerUse
from qwentune.memory.trace.live_bytes import live_bytes, trace
from qwentune.memory.trace.meta_step import (
    fewest_blocks,
    meta_batch,
    meta_step,
    step_of,
    traceable,
    traced_evaluation,
    traced_peak,
)
from qwentune.model.attention import IMPLEMENTATIONS
from qwentune.model.senses import attention_of, network_class, take_media
from qwentune.recipe import DataOptions, MediaOptions, Recipe, Tuning, parse_recipe
from tests.test_trace import NO_OVERHEADS, SETTINGS

# Of the model classes of transformers 5.24 on the meta device (shared reference, computed from published dimensions).
PARAMETERS = {
    "Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen2-VL-72B-Instruct": 73_405_560_320,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen3-VL-2B-Thinking": 2_127_532_032,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-235B-A22B-Thinking": 235_670_022_896,
    "Qwen2-Audio-7B-Instruct": 8_397_094_912,
}
GRIDS = [[1, 8, 16], [1, 12, 20], [1, 10, 18]]  # whole windows of Qwen2.5 and cut ones
PATCHES = sum(h * w for _, h, w in GRIDS)
PAD = 1000
TRAINED = TowerUse(patches=PATCHES, body="trained", merger="trained")
CLIPS = [400, 1000, 3000, 2999, 37]  # mel frames; more than go through Qwen2-Audio's tower at once
FRAMES = len(CLIPS) * 3000
VISION = ["Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"]
OTHERS = ["Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen3.5-4B", "Qwen/Qwen2-Audio-7B-Instruct"]
EVERY = [*VISION, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


def tiny(name: str) -> ModelSpec:
    """A model of the architecture with six layers, or two periods of different ones, and a tower of four blocks."""
    spec = model_spec(name)
    assert spec.tower is not None
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_size": 128}
    vision = spec.tower.vision and replace(
        spec.tower.vision,
        depth=4,
        full_attention=(1, 3) if spec.tower.vision.full_attention else (),
        deepstack=(0, 1, 2) if spec.tower.vision.deepstack else (),
        **small,
    )
    linear = spec.linear_attention
    audio = spec.tower.audio and replace(spec.tower.audio, depth=4, **small)
    return replace(
        spec,
        num_layers=2 * spec.period if spec.period > 1 else 6,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_rows=1024,
        linear_attention=linear
        and replace(linear, num_key_heads=2, num_value_heads=4, key_head_dim=32, value_head_dim=32),
        tower=replace(spec.tower, vision=vision, audio=audio),
    )


def config_of_tiny(spec: ModelSpec) -> Any:
    config: Any = AutoConfig.for_model(**cast(Any, whole_config_of(spec)))
    config.image_token_id = config.audio_token_id = PAD
    return config


def real_batch(settings: Settings, config: Any) -> dict[str, torch.Tensor]:
    """A batch of numbers in which the first tokens are the pads of three pictures or five clips, all of other sizes."""
    batch, family = meta_batch(settings, config), FAMILIES[config.model_type]
    real = {name: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x for name, x in batch.items()}
    num_tokens, grids = settings.forward_tokens, torch.tensor(GRIDS)
    real["input_ids"] = torch.randint(0, PAD, (1, num_tokens))
    real["position_ids"] = torch.arange(num_tokens)[None]
    num_pads = PATCHES // 4
    if family.hearing is not None:
        num_pads = sum(num_pads_of(frames, family.hearing) for frames in CLIPS)
        sounds = {"input_features": torch.randn(len(CLIPS), 128, 3000), "feature_lengths": torch.tensor(CLIPS)}
        real |= sounds | tower_inputs(family, sounds)
    else:
        real |= {"pixel_values": torch.randn(PATCHES, batch["pixel_values"].shape[1]), "image_grid_thw": grids}
        real |= tower_inputs(family, {"image_grid_thw": grids})
        real["depths"] = real["position_ids"]
        real["position_ids"] = real["depths"].expand(3, 1, -1).contiguous()
    real["input_ids"][0, :num_pads] = PAD
    real["visible_until"] = torch.full((1, num_tokens), num_tokens)
    real["predict_from"] = torch.arange(num_tokens)
    return real


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_dimensions_give_the_parameter_count(name: str, count: int) -> None:
    assert model_spec(f"Qwen/{name}").all_parameters == count


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2-VL-2B",
        "Qwen2.5-VL-3B-Instruct",
        "Qwen3-VL-2B-Instruct",
        "Qwen3-VL-30B-A3B-Instruct",
        "Qwen3.5-0.8B",
        "Qwen3.5-35B-A3B",
        "Qwen2-Audio-7B",
        "Qwen2.5-Omni-3B",
        "Qwen3-Omni-30B-A3B-Thinking",
    ],
)
def test_a_folder_is_read_as_transformers_writes_it_and_has_its_parameters(name: str, tmp_path: Path) -> None:
    spec = model_spec(f"Qwen/{name}")
    config = AutoConfig.for_model(**cast(Any, whole_config_of(spec)))
    with torch.device("meta"):
        network = network_class(config)._from_config(config)
    assert spec.all_parameters == sum(parameter.numel() for parameter in network.parameters())
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert model_spec(str(tmp_path)).tower == spec.tower


def test_every_checkpoint_says_what_it_takes_and_the_first_ones_why_not() -> None:
    takes = {name: spec.takes for name, spec in MODELS.items()}
    assert takes["Qwen/Qwen3-8B"] == ("text",)
    assert takes["Qwen/Qwen3.5-9B"] == takes["Qwen/QVQ-72B-Preview"] == ("text", "image", "video")
    assert takes["Qwen/Qwen2-Audio-7B"] == ("text", "audio")
    assert takes["Qwen/Qwen2.5-Omni-7B"] == ("text", "image", "audio")
    for name in NOT_TAKEN:
        with pytest.raises(UsageError, match=r"beside its weights.*\n?.*Take Qwen/Qwen2"):
            model_spec(name)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("kind", "towers", "checkpointing"),
    [
        ("lora", TowerUse(patches=PATCHES), True),
        ("full", TRAINED, True),
        pytest.param("full", TRAINED, False, marks=pytest.mark.slow),
        pytest.param("full", TowerUse(patches=PATCHES), False, marks=pytest.mark.slow),
        pytest.param("lora", TRAINED, True, marks=pytest.mark.slow),
    ],
)
def test_each_region_of_a_real_step_takes_what_the_trace_says(
    name: str, kind: Any, towers: TowerUse, checkpointing: bool
) -> None:
    settings = replace(SETTINGS, kind=kind, gradient_checkpointing=checkpointing, micro_batch=1)
    spec = tiny(name)
    assert spec.tower is not None
    if spec.tower.audio is not None:
        hearing = FAMILIES[spec.checkpoint_type].hearing
        assert hearing is not None
        num_pads = sum(num_pads_of(frames, hearing) for frames in CLIPS)
        towers = replace(towers, patches=0, frames=FRAMES)
        settings = replace(settings, max_tokens=num_pads)
    settings = replace(settings, towers=towers)
    config = config_of_tiny(spec)
    num_recomputed = settings.num_checkpointed(spec.num_layers)
    with traceable(spec, settings):
        step = meta_step(config, settings, num_recomputed, spec.num_layers - num_recomputed)
        traced = live_bytes(step, num_recomputed // spec.period)
    torch.manual_seed(0)
    network: Any = network_class(config)._from_config(
        config, dtype=torch.float32, attn_implementation=attention_of(config, IMPLEMENTATIONS["sdpa"])
    )
    network.config.use_cache = network.config.get_text_config().use_cache = False
    take_media(network)
    step = step_of(network, settings, num_recomputed, real_batch(settings, config))
    measured = live_bytes(step, num_recomputed // spec.period)
    assert ("backward tower" in measured) == towers.is_tuned
    assert "tower" in measured
    for region, terms in measured.items():
        assert sum(traced[region].values()) == pytest.approx(sum(terms.values()), rel=0.005), region


@pytest.mark.slow
@pytest.mark.parametrize("towers", [TowerUse(patches=PATCHES), TRAINED])
def test_shallow_copies_give_the_regions_of_a_deep_model(towers: TowerUse) -> None:
    """Also where pictures are added again after the first layers."""
    settings = replace(SETTINGS, kind="full", towers=towers, micro_batch=1)
    spec = replace(tiny(VISION[1]), num_layers=8)
    config = config_of_tiny(spec)
    with traceable(spec, settings):
        deep = live_bytes(meta_step(config, settings, 8, 0), 8)
        shallow = trace(
            lambda recomputed, kept: meta_step(config, settings, recomputed, kept), 8, 0, fewest_blocks(spec, settings)
        )
    for region, terms in deep.items():
        assert sum(shallow[region].values()) == pytest.approx(sum(terms.values()), rel=0.005), region


CLOSED = [
    ("Qwen/Qwen2.5-VL-3B-Instruct", TowerUse(patches=8192), {"kind": "qlora"}),
    ("Qwen/Qwen2.5-VL-3B-Instruct", TowerUse(patches=2048, body="trained", merger="trained"), {"kind": "full"}),
    ("Qwen/Qwen3-VL-2B-Instruct", TowerUse(patches=8192), {}),
    ("Qwen/Qwen3-VL-2B-Instruct", TowerUse(patches=4096, merger="trained"), {"micro_batch": 2}),
    ("Qwen/Qwen2-VL-2B-Instruct", TowerUse(patches=8192), {"gradient_checkpointing": False}),
    ("Qwen/Qwen3-VL-8B-Instruct", TowerUse(patches=16384), {"max_tokens": 4096}),
    ("Qwen/Qwen3.5-0.8B", TowerUse(patches=4096), {"attention": "sdpa"}),
    ("Qwen/Qwen2-Audio-7B", TowerUse(frames=6000), {}),
    ("Qwen/Qwen2-Audio-7B", TowerUse(frames=3_072_000), {}),  # the shortest clips alone
    ("Qwen/Qwen2-Audio-7B", TowerUse(frames=15000, body="trained", merger="trained"), {"kind": "full"}),
    ("Qwen/Qwen2.5-Omni-3B", TowerUse(frames=6000, patches=2048), {}),
]


@pytest.mark.parametrize(
    ("name", "towers", "changes"),
    CLOSED,
    ids=str,
)
@pytest.mark.slow
def test_the_closed_form_agrees_with_the_trace(name: str, towers: TowerUse, changes: dict[str, Any]) -> None:
    base = replace(SETTINGS, weights="bf16", adapters="bf16", attention="flex_attention", micro_batch=1)
    settings = replace(base, max_tokens=2048, towers=towers)
    settings, spec = replace(settings, **changes), model_spec(name)
    planned = phases(spec, settings, NO_OVERHEADS, merges_here=False)
    assert planned["train_step"].allocated == pytest.approx(traced_peak(spec, settings).allocated, rel=0.03)
    assert planned["evaluate"].allocated == pytest.approx(traced_evaluation(spec, settings).allocated, rel=0.03)


def test_rows_are_judged_by_the_data_else_by_as_many_pads_as_they_hold() -> None:
    frozen = Tuning(kind="lora")
    use = tower_use(model_spec("Qwen/Qwen2.5-VL-3B-Instruct"), frozen, 1000, None, has_media=True)
    assert use == TowerUse(patches=4000)
    assert use is not None
    assert use.is_bound
    seen = RowMedia(patches=600, largest=600)
    assert tower_use(model_spec("Qwen/Qwen3.5-9B"), frozen, 1000, seen, has_media=True) == TowerUse(patches=600)
    assert tower_use(model_spec("Qwen/Qwen3.5-9B"), frozen, 1000, RowMedia(), has_media=False) is None
    assert tower_use(model_spec("Qwen/Qwen3-8B"), frozen, 1000, None, has_media=False) is None
    asked = DataOptions.model_validate({"train": [{"path": "rows.jsonl"}]})
    bounded = asked.model_copy(update={"media": MediaOptions.model_validate({"max_pixels": 100_000})})
    hybrid = model_spec("Qwen/Qwen3.5-9B")
    assert [expects_media(hybrid, data, None) for data in (asked, bounded)] == [False, True]
    assert expects_media(model_spec("Qwen/Qwen3-VL-2B-Instruct"), asked, None)
    first_rows = {
        name: expects_media(
            hybrid, DataOptions.model_validate({"train": [{"path": f"data_templates/{name}.jsonl"}]}), None
        )
        for name in ("chat", "image", "video")
    }
    assert first_rows == {"chat": False, "image": True, "video": True}, "the plan is made before rows are rendered"


@pytest.mark.parametrize(
    "name", ["Qwen2-Audio-7B-Instruct", "Qwen2.5-Omni-3B", "Qwen3-Omni-30B-A3B-Instruct"], ids=lambda name: name[:11]
)
def test_no_row_gives_a_tower_more_than_the_bound_before_rows_are_rendered(name: str) -> None:
    """Of rows that are filled with clips of one length, each length in turn, and of rows of a few tokens."""
    spec = model_spec(f"Qwen/{name}")
    hearing = FAMILIES[spec.checkpoint_type].hearing
    assert hearing is not None
    whole = round(100 * (hearing.most_seconds or 0))
    for max_tokens in (2, 3, 100, 2048):
        bound = most_media(spec, TowerUse(), max_tokens).frames
        for samples in range(1600, 480_001, 160):
            frames = mel_frames(samples, hearing)
            clips = max_tokens // num_pads_of(frames, hearing)
            assert clips * max(frames, whole) <= bound, (max_tokens, samples)


@pytest.mark.parametrize("body", ["frozen", "trained"])
@pytest.mark.parametrize("name", ["Qwen2.5-Omni-7B", "Qwen3-Omni-30B-A3B-Instruct"])
def test_a_row_of_pictures_and_sounds_takes_no_more_memory_than_the_bound(name: str, body: Any) -> None:
    spec, max_tokens = model_spec(f"Qwen/{name}"), 2048
    bound = most_media(spec, TowerUse(body=body, merger=body), max_tokens)
    settings = replace(SETTINGS, kind="lora", max_tokens=max_tokens, weights="bf16", towers=bound)
    most = phases(spec, settings, NO_OVERHEADS, merges_here=False)
    for share in (0, 0.1, 0.5, 0.9, 1):
        shown = replace(bound, patches=int(share * bound.patches), frames=int((1 - share) * bound.frames))
        for phase, terms in phases(spec, replace(settings, towers=shown), NO_OVERHEADS, merges_here=False).items():
            assert terms.total <= most[phase].total, (share, phase)


FILM = RowMedia(patches=40_000, largest=12_800, num_frames=50)
MENDED = [
    ("Qwen2.5-VL-3B-Instruct", RowMedia(patches=60_000, largest=12_000), {"tuning.merger": "trained"}),
    ("Qwen2.5-VL-7B-Instruct", None, {"data.max_tokens": 32768}),
    ("Qwen2-VL-7B-Instruct", FILM, {"tuning.merger": "trained", "data.packing": False}),
    ("Qwen3-VL-8B-Instruct", FILM, {"tuning.kind": "qlora"}),
    ("Qwen3-VL-4B-Instruct", RowMedia(patches=9_000, largest=300), {"tuning.kind": "full"}),
    ("Qwen3-VL-4B-Instruct", RowMedia(), {"tuning.kind": "full"}),
    ("Qwen3.5-4B", RowMedia(patches=60_000, largest=60_000), {"tuning.kind": "qlora", "data.packing": False}),
    ("Qwen2-Audio-7B-Instruct", RowMedia(frames=9_000), {}),
    ("Qwen2.5-Omni-7B", RowMedia(patches=9_000, frames=9_000, largest=4_000), {}),
]


@pytest.mark.parametrize(("name", "shown", "changes"), MENDED, ids=str)
@pytest.mark.parametrize("gpu", ["rtx-3060", "rtx-4090"])
def test_every_mend_fits_when_it_is_applied(
    name: str, shown: RowMedia | None, changes: dict[str, Any], gpu: str
) -> None:
    """Judged again as the command that is pasted judges: its rows are not rendered where a mend changes them.

    Nor do the fullest rows that rendering can then find ask for more.
    """
    text = f"{{model: Qwen/{name}, tuning: {{kind: lora}}, data: {{train: [data_templates/image.jsonl]}}}}"
    spec, given = model_spec(f"Qwen/{name}"), {"hardware.gpu": gpu, "data.max_tokens": 16384, **changes}
    overrides = [f"{key}={str(value).lower()}" for key, value in given.items()]
    recipe = parse_recipe(text, "recipe.yaml", overrides).recipe

    def judged(recipe: Recipe, media: RowMedia | None) -> RunPlan:
        device, count, sharding = device_of(recipe.hardware, here=False)
        return judge_recipe(spec, recipe, device=device, num_ranks=count, sharding=sharding, media=media)

    plan = judged(recipe, shown)
    assert plan.mends or (plan.fits and gpu == "rtx-4090")
    for mend in plan.mends:
        changed = parse_recipe(text, "recipe.yaml", [*overrides, *mend.overrides]).recipe
        renders_again = changed.data != recipe.data
        applied = judged(changed, None if renders_again else shown)
        assert applied.fits, mend
        assert mend.saves_bytes <= plan.peak_bytes, mend
        if renders_again and spec.tower is not None:
            full = most_media(spec, TowerUse(), changed.data.max_tokens)
            assert judged(changed, RowMedia(full.patches, full.frames)).fits, mend


@pytest.mark.parametrize("name", ["Qwen2-VL-7B-Instruct", "Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct"])
@pytest.mark.parametrize("film", [Film(1920, 1080, 9000, 30.0), Film(640, 480, 100, 25.0), Film(64, 2000, 31, 1.0)])
def test_a_mend_of_videos_makes_them_as_much_smaller_as_rows_get_shorter(name: str, film: Film) -> None:
    """Also of families in which all frames together are bounded, at that bound."""
    spec = model_spec(f"Qwen/{name}")
    family = FAMILIES[spec.checkpoint_type]

    def patches(media: dict[str, Any]) -> tuple[int, int]:
        limits = media_limits(None, family, MediaOptions.model_validate(media))
        assert limits.vision is not None
        frames = len(frames_taken(film, limits.vision.fps, limits.vision))
        height, width = video_size(film, frames, limits.vision, {})
        return -(-frames // limits.vision.temporal) * height * width // limits.vision.patch**2, frames

    largest, num_frames = patches({})
    request = PlanRequest(
        kind="qlora",
        max_tokens=max(1024, largest // 4 * 5 // 4),
        sequences_per_step=1,
        towers=TowerUse(patches=largest),
        largest=RowMedia(patches=largest, largest=largest, num_frames=num_frames),
    )
    for halvings in (1, 2, 3):
        max_tokens = request.max_tokens >> halvings
        overrides = dict(one.split("=") for one in shorter(spec, request, max_tokens).overrides)
        media = {key.removeprefix("data.media."): int(one) for key, one in overrides.items() if "media" in key}
        assert patches(media)[0] <= largest / 2**halvings, halvings


def test_large_pictures_that_do_not_fit_are_mended_by_smaller_ones_in_shorter_rows() -> None:
    spec = model_spec("Qwen/Qwen2.5-VL-3B-Instruct")
    request = PlanRequest(
        kind="lora",
        max_tokens=16384,
        sequences_per_step=1,
        gradient_checkpointing=True,
        towers=TowerUse(patches=65536, body="trained", merger="trained"),
        largest=RowMedia(patches=65536, largest=65536),
    )
    plan = make_plan(spec, gpu_spec("rtx-3090"), request)
    assert not plan.fits
    assert any(override.startswith("data.media.max_pixels=") for mend in plan.mends for override in mend.overrides)
    assert plan.phases["train_step"].terms["media"] > plan.phases["train_step"].terms["towers"] > 0


def test_frozen_towers_stay_whole_where_cards_share_the_weights() -> None:
    spec, gpu = model_spec("Qwen/Qwen3-VL-32B-Instruct"), gpu_spec("h100-80gb")
    assert spec.tower is not None
    request = PlanRequest(kind="full", max_tokens=2048, sequences_per_step=8, num_gpus=8, towers=TowerUse(patches=8192))
    plan = make_plan(spec, gpu, request)
    assert plan.choices.sharding == "fsdp2"
    terms = plan.phases["train_step"].terms
    assert terms["towers"] == 2 * spec.tower.parameters
    assert terms["weights"] == pytest.approx(2 * spec.parameters / 8, rel=0.01)
    for sharding, towers, why in (
        ("zero3", TowerUse(patches=8192), "held whole on every card"),
        ("fsdp2", TowerUse(patches=8192, merger="trained"), "stay whole, so they cannot be trained"),
    ):
        with pytest.raises(UsageError, match=why):
            make_plan(spec, gpu, replace(request, sharding=sharding, towers=towers))
    tuned = replace(request, kind="lora", towers=TowerUse(patches=8192, merger="trained"))
    assert make_plan(spec, gpu, tuned).choices.sharding == "ddp"
