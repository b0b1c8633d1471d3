"""Models that see and hear: packed rows equal single examples, towers stay out of it, and what is saved comes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer

from qwentune.data.layout.batch import collate
from qwentune.data.layout.tower_inputs import tower_inputs
from qwentune.data.layout.trie import lay_out
from qwentune.data.media.limits import media_limits
from qwentune.exporting.omni import is_omni, is_thinker
from qwentune.exporting.processors import PROCESSOR_FILES, write_processors
from qwentune.exporting.whole import copy_other_files, put_back
from qwentune.facts.media import FAMILIES, MediaFamily, with_positions
from qwentune.facts.models import model_spec
from qwentune.facts.towers import part_of, part_problems
from qwentune.facts.weight_files import read_weights
from qwentune.model.adapters import add_adapters, load_adapters
from qwentune.model.attention import IMPLEMENTATIONS
from qwentune.model.head import LossHead
from qwentune.model.loading import load_model, read_config, recompute_layers
from qwentune.model.senses import freeze, network_class
from qwentune.recipe import MediaOptions, Tuning
from qwentune.training.step import ExactStep
from qwentune.training.trainer import save_weights
from tests.media.checkpoints import HEARS, HYBRIDS, TYPES, MediaType, add_media_weights, write_media_checkpoint

FIRST: MediaType = "qwen2_5_vl"
EVERY = [pytest.param(name, marks=() if name == FIRST else pytest.mark.slow) for name in TYPES]


@dataclass(frozen=True)
class Thing:
    """A picture of noise, or a sound: the patches (P, ·) with their grid, or mel features (bins, frames)."""

    kind: str
    values: Tensor
    grid: tuple[int, int, int]
    num_tokens: int


@dataclass(frozen=True)
class World:
    """A checkpoint and things that it may be shown; thing k is written -(k + 1), once for each of its pads."""

    folder: Path
    things: tuple[Thing, ...]
    marks: dict[str, tuple[int, int]]

    @property
    def model_type(self) -> str:
        return self.folder.name

    @property
    def family(self) -> MediaFamily:
        return with_positions(FAMILIES[self.model_type], json.loads((self.folder / "config.json").read_text()))

    def example(self, seed: int, things: Sequence[int], answer: int = 4) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights: some text, things with text between them, and an answer; the seed decides the text."""
        rng = np.random.default_rng(seed)
        ids = [*rng.integers(10, 900, 3)]
        for k in things:
            start, end = self.marks[self.things[k].kind]
            ids += [start, *[-(k + 1)] * self.things[k].num_tokens, end, *rng.integers(10, 900, 2)]
        weights = [0.0] * len(ids) + [1.0] * answer
        return np.array([*ids, *rng.integers(10, 900, answer)], np.int32), np.array(weights, np.float32)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A world for each model type, made when it is first asked for."""
    made: dict[str, World] = {}
    folder = tmp_path_factory.mktemp("media")

    def world(model_type: MediaType) -> World:
        if model_type not in made:
            made[model_type] = make_world(folder / model_type, model_type)
        return made[model_type]

    return world


def make_world(folder: Path, model_type: MediaType) -> World:
    family = FAMILIES[model_type]
    add_media_weights(write_media_checkpoint(folder, model_type))
    torch.manual_seed(1)
    things: list[Thing] = []
    if family.vision is not None:
        width = 3 * family.vision.temporal * family.vision.patch**2
        for h, w in ((4, 6), (4, 6), (8, 10)):
            things.append(Thing("image", torch.randn(h * w, width), (1, h, w), h * w // 4))
    if family.hearing is not None:
        for frames in (130, 130, 420):
            count = frames // 4 if family.hearing.count == "halved_twice" else num_by_hundred(frames)
            things.append(Thing("audio", torch.randn(family.hearing.mel_bins, frames), (frames, 0, 0), count))
    config: Any = read_config(folder, has_media=True)
    marks = {
        kind: (getattr(config, f"{name}_start_token_id", 11), getattr(config, f"{name}_end_token_id", 12))
        for kind, name in (("image", "vision"), ("audio", "audio"))
    }
    return World(folder, tuple(things), marks)


def num_by_hundred(frames: int) -> int:
    rest = (frames % 100 - 1) // 2 + 1
    return ((rest - 1) // 2 + 1 - 1) // 2 + 1 + 13 * (frames // 100)


def positions(ids: Sequence[int], things: Sequence[Thing]) -> np.ndarray:
    """(3, T): text counts up, a picture has its rows and columns from where it begins."""
    out, place, at = np.zeros((3, len(ids)), np.int64), 0, 0
    while at < len(ids):
        thing = things[-ids[at] - 1] if ids[at] < 0 else None
        if thing is None or thing.kind == "audio":
            out[:, at] = place
            place, at = place + 1, at + 1
            continue
        _, h, w = thing.grid
        block = np.stack(np.meshgrid(0, np.arange(h // 2), np.arange(w // 2), indexing="ij")).reshape(3, -1) + place
        out[:, at : at + thing.num_tokens] = block[:, : len(ids) - at]  # the path may end inside
        place, at = int(block.max()) + 1, at + thing.num_tokens
    return out


def batch_of(world: World, config: Any, tries: Any) -> dict[str, Tensor]:
    """What collate gives of a row of tries with media: pads, 3-D positions, tensors of the things, tower inputs."""
    row = lay_out(tries)
    batch = collate([row], 1.0)
    ids = row.input_ids
    if world.family.axes == 3:
        paths = [[k for k in range(q + 1) if q < row.visible_until[k]] for q in range(len(ids))]
        found = [positions([int(ids[k]) for k in path], world.things)[:, -1] for path in paths]
        batch |= {"depths": batch["position_ids"], "position_ids": torch.tensor(np.array(found).T)[:, None]}
    starts = [at for at in range(len(ids)) if ids[at] < 0 and (at == 0 or ids[at - 1] != ids[at])]
    return batch | {"input_ids": with_pads(ids, world, config)} | tensors_of(world, [-ids[at] - 1 for at in starts])


def with_pads(ids: np.ndarray, world: World, config: Any) -> Tensor:
    pads = {kind: getattr(config, f"{kind}_token_id") for kind in {thing.kind for thing in world.things}}
    return torch.tensor([[pads[world.things[-i - 1].kind] if i < 0 else i for i in map(int, ids)]])


def tensors_of(world: World, numbers: Sequence[int]) -> dict[str, Tensor]:
    shown = [world.things[k] for k in numbers]
    batch: dict[str, Tensor] = {}
    if pictures := [thing for thing in shown if thing.kind == "image"]:
        batch["pixel_values"] = torch.cat([thing.values for thing in pictures])
        batch["image_grid_thw"] = torch.tensor([thing.grid for thing in pictures])
    if sounds := [thing.values for thing in shown if thing.kind == "audio"]:
        longest = 3000 if world.model_type == "qwen2_audio" else max(sound.shape[1] for sound in sounds)
        padded = [torch.nn.functional.pad(sound, (0, longest - sound.shape[1])) for sound in sounds]
        batch["input_features"] = torch.stack(padded)
        batch["feature_lengths"] = torch.tensor([sound.shape[1] for sound in sounds])
    return batch | tower_inputs(world.family, batch)


def plain_loss(network: Any, world: World, example: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """The loss of one example as transformers' own forward has it, positions and all."""
    ids, weights = example
    row = with_pads(ids, world, network.config)
    starts = [at for at in range(len(ids)) if ids[at] < 0 and (at == 0 or ids[at - 1] != ids[at])]
    arguments = {
        name: tensor
        for name, tensor in tensors_of(world, [-ids[at] - 1 for at in starts]).items()
        if name in ("pixel_values", "image_grid_thw", "input_features")
    }
    if "input_features" in arguments:
        lengths = [world.things[-ids[at] - 1].grid[0] for at in starts if world.things[-ids[at] - 1].kind == "audio"]
        frames = torch.arange(arguments["input_features"].shape[-1])
        arguments["feature_attention_mask"] = (frames < torch.tensor(lengths)[:, None]).long()
    if world.model_type in HEARS:
        arguments["attention_mask"] = torch.ones_like(row)
    else:
        arguments["mm_token_type_ids"] = (row == network.config.image_token_id).int()
    logits = network(input_ids=row, use_cache=False, **arguments).logits[0]
    return (cross_entropy(logits[:-1], row[0, 1:], reduction="none") * torch.tensor(weights[1:])).sum()


def plain_network(world: World) -> Any:
    config = read_config(world.folder, has_media=True)
    return network_class(config).from_pretrained(world.folder, config=config, dtype=torch.float32).train()


def gradients(network: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        assert float((found.get(name, torch.zeros(())) - grad).abs().max()) <= 1e-5 * scale, name


def ours(world: World, **options: Any) -> Any:
    network = load_model(world.folder, dtype="fp32", attention=IMPLEMENTATIONS["sdpa"], has_media=True, **options)
    return network.train()


@pytest.mark.parametrize("model_type", EVERY)
def test_rows_with_media_train_as_single_examples_do(worlds: Any, model_type: MediaType) -> None:
    """Packed and in a trie, against transformers' own forward of each example alone; towers trained."""
    world: World = worlds(model_type)
    every = range(len(world.things))
    tries = [[world.example(0, every), world.example(1, [1])], [world.example(2, [0, *every])]]
    shared, weights = world.example(0, [1, 0], answer=0)
    for k in (5, 6):
        ids, more = world.example(k, [2])
        tries.append([(np.concatenate([shared, ids]), np.concatenate([weights, more]))])
    tries[-2:] = [[*tries[-2], *tries[-1]]]
    plain = plain_network(world)
    total = sum(plain_loss(plain, world, example) for group in tries for example in group)
    assert isinstance(total, Tensor)
    total.backward()

    network = ours(world)
    head = LossHead(network, "supervised")
    # Linear attention cannot be told where an example begins: one in a row.
    rows = [[[example]] for group in tries for example in group] if model_type in HYBRIDS else [tries]
    losses = [head.loss(network, batch_of(world, network.config, row)) for row in rows]
    sum(losses).backward()  # type: ignore[union-attr]
    assert float(sum(losses)) == pytest.approx(float(total), rel=1e-5)
    assert_close(gradients(network), gradients(plain))
    # Two things of one size in each other's places: what is equal above could tell.
    other = replace(world, things=(*reversed(world.things[:2]), *world.things[2:]))
    with torch.no_grad():
        alone, after = (
            float(head.loss(network, batch_of(each, network.config, [[world.example(0, every)]])))
            for each in (world, other)
        )
    assert abs(alone - after) > 1e-3


def lora(**keys: Any) -> Tuning:
    return Tuning(kind="lora", rank=2, **keys)


def parts_with_adapters(adapted: Any) -> set[str]:
    return {part_of(name) for name, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_type", EVERY)
def test_adapters_stand_only_where_they_are_asked_for(worlds: Any, model_type: MediaType, tmp_path: Path) -> None:
    """Whatever a module of a tower is called; and what is saved is loaded again bit for bit."""
    world: World = worlds(model_type)
    batch = batch_of(world, read_config(world.folder, has_media=True), [[world.example(0, range(len(world.things)))]])
    for k, (tuning, wanted) in enumerate(
        (
            (lora(), {"language"}),
            (lora(targets=["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]), {"language"}),
            (lora(merger="adapters"), {"language", "merger"}),
            (lora(targets=["q_proj"], towers="adapters"), {"language", "tower"}),
            (lora(merger="trained"), {"language", "merger"}),
            (lora(towers="trained", merger="trained"), {"language", "tower", "merger"}),
        )
    ):
        adapted = add_adapters(ours(world), tuning, "fp32", [5, 6])
        assert parts_with_adapters(adapted) == wanted
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        save_weights(adapted, tmp_path / str(k))
        again = load_adapters(ours(world), tmp_path / str(k), "fp32")
        losses = [LossHead(model, "supervised").loss(model, batch) for model in (adapted, again)]
        assert losses[0] == losses[1]
        trained = {name: p for name, p in again.named_parameters() if p.requires_grad}
        losses[1].backward()
        assert [name for name, p in trained.items() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("model_type", EVERY)
def test_recomputing_gives_the_same_bits_and_leaves_a_frozen_tower_alone(
    worlds: Any, model_type: MediaType, kind: str
) -> None:
    world: World = worlds(model_type)
    batch = batch_of(world, read_config(world.folder, has_media=True), [[world.example(0, range(len(world.things)))]])
    found: list[Any] = []
    for recomputed in (False, True):
        network = ours(world)
        torch.manual_seed(2)
        recompute_layers(network, recomputed)
        if kind == "full":
            freeze(network, ["language"])
        model = network if kind == "full" else add_adapters(network, lora(), "fp32")
        outputs: list[Tensor] = []
        for name, module in network.named_modules():
            if part_of(name) != "language" and not list(module.children()):
                module.register_forward_hook(lambda _m, _i, output, seen=outputs: seen.append(output))
        loss = LossHead(model, "supervised").loss(model, batch)
        loss.backward()
        assert outputs
        assert not any(output.requires_grad for output in outputs if isinstance(output, Tensor))
        found.append((loss, gradients(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())
    assert {part_of(name) for name in found[0][1]} == {"language"}


@pytest.mark.parametrize("model_type", EVERY)
def test_a_trained_tower_is_recomputed_and_has_gradients_without_media_too(worlds: Any, model_type: MediaType) -> None:
    """Zeros, on a batch of text alone: else the ranks that have pictures would wait for the one that has none."""
    world: World = worlds(model_type)
    config = read_config(world.folder, has_media=True)
    batch = batch_of(world, config, [[world.example(0, range(len(world.things)))]])
    found: list[dict[str, Tensor]] = []
    for recomputed in (False, True):
        network = ours(world)
        recompute_layers(network, False, towers=recomputed)
        freeze(network, ["tower", "merger"])
        LossHead(network, "supervised").loss(network, batch).backward()
        found.append(gradients(network))
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    # What two text layers do with the second deep features comes after all attention.
    assert {name for name, grad in found[0].items() if not grad.any() and "merger_list.1." not in name} == set()
    network.zero_grad()
    freeze(network, ["tower"])
    text = batch_of(world, config, [[world.example(0, [])]])
    LossHead(network, "supervised").loss(network, text).backward()
    trained = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert trained
    assert all(grad is not None and not grad.any() for grad in trained.values())


@pytest.mark.parametrize("model_type", EVERY)
def test_a_checkpoint_of_full_tuning_is_loaded_as_it_was(worlds: Any, model_type: MediaType, tmp_path: Path) -> None:
    """Bit for bit, under the names that the base has on disk, and the folder says that it sees and hears."""
    world: World = worlds(model_type)
    network = ours(world)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save_weights(network, tmp_path)
    again = load_model(tmp_path, dtype="fp32", has_media=True)
    assert type(again) is type(network)
    there = dict(again.named_parameters())
    assert all(torch.equal(p, there[name]) for name, p in network.named_parameters())
    assert read_weights(tmp_path).keys() == read_weights(world.folder).keys()


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=pytest.mark.slow) for name in TYPES])
def test_towers_stay_in_16_bits_beside_4_bit_weights(worlds: Any, model_type: MediaType) -> None:
    network = ours(worlds(model_type), four_bit=True)
    in_4_bits = {part_of(name) for name, module in network.named_modules() if isinstance(module, Linear4bit)}
    assert in_4_bits == {"language"}


def test_parts_have_learning_rates_of_their_own(worlds: Any) -> None:
    network = ours(worlds(FIRST))
    freeze(network, ["language", "tower", "merger"])
    arguments = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999)
    tuning = Tuning(kind="full", towers="trained", merger="trained", towers_learning_rate=1e-5)
    trainer = SimpleNamespace(
        model=network, args=arguments, eight_bit=False, shards=None, lora_plus_ratio=1.0, part_rates=tuning.part_rates,
        get_decay_parameter_names=lambda model: cast(Any, Trainer).get_decay_parameter_names(None, model),
    )  # fmt: skip
    optimizer = ExactStep.create_optimizer(trainer)  # type: ignore[arg-type]
    names = {parameter: name for name, parameter in network.named_parameters()}
    rates = {(part_of(names[p]), group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    assert rates == {("language", 1e-3), ("tower", 1e-5), ("merger", 1e-3)}
    assert optimizer.param_groups[0]["lr"] == 1e-3, "the first group's is the one that is logged"


def test_towers_are_trained_only_where_they_are_loaded_and_whole() -> None:
    sees, reads = model_spec("Qwen/Qwen2.5-VL-3B-Instruct"), model_spec("Qwen/Qwen3-0.6B")
    both = lora(towers="adapters", merger="trained")
    assert part_problems(sees, both, has_media=True, sharding="ddp") == []
    assert [problem.where for problem in part_problems(sees, both, has_media=False, sharding="none")] == [
        "tuning.towers",
        "tuning.merger",
    ]
    assert "reads text only" in part_problems(reads, both, has_media=False, sharding="none")[0].what
    assert part_problems(sees, lora(), has_media=True, sharding="fsdp2") == []  # its towers are frozen
    refused = (both, "fsdp2", "so they cannot be trained"), (lora(), "zero2", "held whole on every card")
    for tuning, sharding, why in refused:
        problem = part_problems(sees, tuning, has_media=True, sharding=sharding)[0]
        assert problem.where == "hardware.launch"
        assert why in problem.what
    assert part_problems(reads, lora(), has_media=False, sharding="fsdp2") == []


@pytest.mark.parametrize("model_type", TYPES)
def test_a_server_scales_pictures_as_the_run_did(tmp_path: Path, model_type: MediaType) -> None:
    """Its limits are those of the package's processor files, the run's those of the base's and the recipe's."""
    base, family = write_media_checkpoint(tmp_path / "base", model_type), FAMILIES[model_type]
    target = tmp_path / "target"
    target.mkdir()
    shutil.copyfile(base / "config.json", target / "config.json")
    options = MediaOptions(max_pixels=100_000, min_pixels=70_000)
    write_processors(target, base, options)
    served, trained = media_limits(target, family, MediaOptions()), media_limits(base, family, options)
    assert served.hearing == trained.hearing
    assert (served.vision is None) == (trained.vision is None)
    if served.vision is not None and trained.vision is not None:
        for limit in ("min_pixels", "max_pixels", "patch", "mean"):
            assert getattr(served.vision, limit) == getattr(trained.vision, limit), limit
    write_processors(target, base, MediaOptions())
    assert all(
        (target / name).read_bytes() == (base / name).read_bytes() for name in PROCESSOR_FILES if (base / name).exists()
    )


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_5_omni", "qwen3_omni_moe")]
)
def test_a_tuned_thinker_goes_back_into_its_omni_model(worlds: Any, model_type: str, tmp_path: Path) -> None:
    world: World = worlds(f"{model_type}_thinker")
    base = shutil.copytree(world.folder, tmp_path / "base")
    config = {"model_type": model_type, "thinker_config": json.loads((world.folder / "config.json").read_text())}
    (base / "config.json").write_text(json.dumps(config))
    (base / "spk_dict.pt").write_bytes(b"voices")
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(world.folder / "model.safetensors").items()}
    speech = {
        "talker.a": torch.ones(3),
        ("token2wav.b" if model_type == "qwen2_5_omni" else "code2wav.b"): torch.ones(2),
    }
    save_file(tensors | speech, base / "model.safetensors", metadata={"format": "pt"})
    assert is_omni(base)
    network = load_model(base, dtype="fp32", has_media=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    save_weights(network, tmp_path / "tuned")
    assert is_thinker(tmp_path / "tuned")
    put_back(base, tmp_path / "tuned")
    copy_other_files(base, tmp_path / "tuned")
    assert is_omni(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "spk_dict.pt").read_bytes() == b"voices"
    stored = load_file(tmp_path / "tuned" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in speech.items())
    again = dict(load_model(tmp_path / "tuned", dtype="fp32", has_media=True).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in network.named_parameters())
