"""Model folders and adapters mutated as bytes and as values: every answer is words, and no other weights are taken.

A few inputs each time; `pytest -m soak tests/faults/test_fuzz_models.py` tries thousands, and QWENTUNE_SEED begins
elsewhere.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
from safetensors import safe_open

from qwentune.data.dataset import chat_template, prepare
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import UserError
from qwentune.exporting.package import write_package
from qwentune.facts.models import model_spec, previewed_spec
from qwentune.memory.judge import judge_recipe
from qwentune.memory.settings import HostMemory
from qwentune.model.adapters import add_adapters
from qwentune.model.hollow import refuse_other_weights
from qwentune.model.loading import load_model, silence_loading
from qwentune.recipe import Recipe, Tuning, load_recipe
from qwentune.training.trainer import save_weights
from tests.checkpoints import add_weights, write_checkpoint
from tests.model_folders import Mutation, of_bytes, of_header, of_value
from tests.runs import write_recipe

SEED = int(os.environ.get("QWENTUNE_SEED", "20251130"))
SECONDS, MEMORY_BYTES = 20, 4 * 2**30
DESCRIPTIONS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
)
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "adapter_config.json")
ROW = {"messages": [{"role": "user", "content": "Hi, <|im_end|> 你好"}, {"role": "assistant", "content": "Hello é"}]}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with weights, `adapter` beside it, and a recipe."""
    silence_loading()
    folder = tmp_path_factory.mktemp("original")
    base = add_weights(write_checkpoint(folder / "base", "qwen3"))
    save_weights(add_adapters(load_model(base, dtype="fp32"), Tuning(kind="lora", rank=2), "fp32"), folder / "adapter")
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    tuning = {"kind": "lora", "rank": 2, "start_from": str(folder / "adapter")}
    write_recipe(folder, base, tuning=tuning, data={"train": str(folder / "rows.jsonl"), "max_dropped_fraction": 0.9})
    return folder


def answer(recipe: Recipe, target: Path) -> None:
    """All that a run reads of its model's folder before it trains, and when it publishes."""
    spec = model_spec(recipe.model)
    previewed_spec(recipe.model, packing=True)
    judge_recipe(spec, recipe, device=HostMemory(2**40), num_ranks=1, sharding="none")
    base, adapter = Path(recipe.model), Path(str(recipe.tuning.start_from))
    tokenizer = load_tokenizer(base)
    prepare(recipe.data, tokenizer, chat_template(recipe.data, tokenizer), seed=1)
    refuse_other_weights(base, adapter)
    target.mkdir()
    template, end = tokenizer.chat_template, tokenizer.end_of_text_id
    write_package(target, base, chat_template=template, stop_token_ids=[end], end_of_text_id=end)


def shapes(file: Path) -> dict[str, tuple[list[int], bool]]:
    """The tensors of a file by the safetensors library: shape, and whether they are floats of 16 or 32 bits."""
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: (part.get_shape(), part.get_dtype() in ("F32", "F16", "BF16")) for name, part in slices.items()}


def mutations(chance: random.Random, folder: Path, name: str) -> Mutation:
    """One way to damage a file of the folder."""
    file = folder / name
    if name.endswith(".safetensors"):
        return of_bytes(chance) if chance.random() < 0.3 else of_header(chance, file)
    if name.endswith(".json") and chance.random() < 0.7:
        return of_value(chance, json.loads(file.read_bytes()))
    return of_bytes(chance)


def attacked(original: Path, tmp_path: Path, number: int, names: tuple[str, ...]) -> list[str]:
    """What went wrong with so many mutated folders; each is named with the seed that makes it again."""
    wrong: list[str] = []
    expected = {name: shapes(path) for name, path in weight_files(original).items()}
    for count in range(number):
        chance = random.Random(SEED + count)
        name = names[count % len(names)]
        work = tmp_path / "work"
        shutil.copytree(original, work)
        file = work / ("adapter" if name.startswith("adapter") else "base") / name
        what, mutate = mutations(chance, file.parent, name)
        mutate(file)
        recipe = load_recipe(original / "recipe.yaml").recipe
        tuning = recipe.tuning.model_copy(update={"start_from": str(work / "adapter")})
        recipe = recipe.model_copy(update={"model": str(work / "base"), "tuning": tuning})
        try:
            with limited(SECONDS):
                answer(recipe, work / "published")
            taken = {name: shapes(path) for name, path in weight_files(work).items()}
        except UserError as error:
            if str(work) not in str(error) and "rows.jsonl" not in str(error):
                wrong.append(f"seed {SEED + count}: {name} {what}: no file is named: {error}")
        except BaseException as error:
            wrong.append(f"seed {SEED + count}: {name} {what}: {type(error).__name__}: {str(error)[:200]}")
        else:
            if taken != expected:
                wrong.append(f"seed {SEED + count}: {name} {what}: other weights are taken")
        shutil.rmtree(work)
        gc.collect()
    return wrong


def weight_files(folder: Path) -> dict[str, Path]:
    return {"base": folder / "base" / WEIGHTS[0], "adapter": folder / "adapter" / WEIGHTS[1]}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after so many seconds."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"no answer after {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def within_memory(work: Callable[[], list[str]]) -> list[str]:
    """What it returns in a process that may take only so much memory beyond what it has."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, taken + MEMORY_BYTES))
        sender.send(work())

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return ["the process died"]
    finally:
        process.join()


@pytest.mark.fault("L86", "the file, its key or place, and how to mend it; exit 2 for what describes a model")
def test_a_damaged_description_of_a_model_is_answered_in_words(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    wrong = attacked(original, tmp_path, 30, DESCRIPTIONS)
    assert not wrong, "\n".join(wrong)


@pytest.mark.fault("L85", "the file, and what its header tells otherwise; exit 5, before an old run is moved aside")
def test_weights_that_are_not_the_model_s_are_never_taken(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    wrong = attacked(original, tmp_path, 24, WEIGHTS)
    assert not wrong, "\n".join(wrong)


@pytest.mark.soak
@pytest.mark.fault("L85 L86", "thousands of damaged folders: none later than 20 s or above 4 GB, none a traceback")
@pytest.mark.parametrize("names", [DESCRIPTIONS, WEIGHTS], ids=["descriptions", "weights"])
def test_no_damaged_folder_of_thousands_is_a_traceback(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    print(f"seed {SEED}")
    number = int(os.environ.get("QWENTUNE_INPUTS", "2000"))
    wrong = within_memory(lambda: attacked(original, tmp_path, number, names))
    assert not wrong, "\n".join(wrong)
