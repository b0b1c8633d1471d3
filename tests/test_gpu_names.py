"""A GPU is found by the names that people, shops and drivers give it, or by its memory; or what is meant is named."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qwentune.errors import UsageError
from qwentune.facts.gpus import GPUS, gpu_spec
from qwentune.memory.device_remarks import rates_remark
from qwentune.recipe import parse_recipe


def test_every_gpu_that_people_buy_is_in_the_table() -> None:
    wanted = (
        "gtx-1650 rtx-3060 rtx-3080 rtx-3090 rtx-4070 rtx-4080 rtx-4080-super rtx-4090 rtx-5070-ti rtx-5080 rtx-5090 "
        "a10g a6000 rtx-6000-ada l4 l40s t4 v100-16gb v100-32gb a100-40gb a100-80gb h100-80gb h20 h200 b200"
    )
    assert set(wanted.split()) <= set(GPUS)
    assert all("data sheet" in gpu.source for gpu in GPUS.values())
    for gpu in GPUS.values():  # bf16 came with Ampere
        assert gpu.has_bf16 == (gpu.fp16_tflops is None) == (gpu.compute_capability >= (8, 0)), gpu.name


def test_the_rates_of_geforce_cards_are_those_with_fp32_accumulation() -> None:
    for name, gpu in GPUS.items():
        if re.match(r"rtx-[345]0[5-9]0", name):
            assert gpu.bf16_tflops == pytest.approx(2 * gpu.fp32_tflops, rel=0.01), name


SPELLINGS: list[Callable[[str], str]] = [
    str.upper,
    lambda name: name.replace("-", " "),
    lambda name: name.replace("-", "_"),
    lambda name: name.replace("rtx-", "").replace("gtx-", ""),
    lambda name: name.replace("rtx-", "RTX").replace("gtx-", "GTX"),
    lambda name: name.replace("-ti", "ti").replace("-super", " SUPER"),
    lambda name: re.sub(r"-(\d+)gb$", r" \1 GB", name),
    lambda name: re.sub(r"-(\d+)gb$", r"-\1G", name),
    lambda name: f"NVIDIA GeForce {name.replace('-', ' ').title()}",
    lambda name: f"  nvidia {name} GPU",
]


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_found_as_people_write_its_name(name: str) -> None:
    for spelt in SPELLINGS:
        assert gpu_spec(spelt(name)).name == name, spelt(name)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("RTX 4090 24GB", "rtx-4090"),
        ("h100", "h100-80gb"),
        ("H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("A100-SXM4-80GB", "a100-80gb"),
        ("A100 80GB PCIe", "a100-80gb"),
        ("3070", "rtx-3070"),
        ("RTX A6000", "a6000"),
        ("4060ti 16gb", "rtx-4060-ti-16gb"),
        ("4070TiSuper", "rtx-4070-ti-super"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
    ],
)
def test_names_of_shops_and_drivers_are_understood(written: str, name: str) -> None:
    assert gpu_spec(written).name == name


def test_a_recipe_takes_a_name_of_digits_without_quotes() -> None:
    recipe = "model: Qwen/Qwen3-8B\ntuning: {kind: lora}\ndata: {train: rows.jsonl}\nhardware: {gpu: 3070}\n"
    assert parse_recipe(recipe, "r.yaml").recipe.hardware.gpu == "3070"
    assert parse_recipe(recipe, "r.yaml", ["hardware.gpu=4090"]).recipe.hardware.gpu == "4090"


@pytest.mark.parametrize(
    ("written", "offered"),
    [
        ("A100", ["a100-40gb", "a100-80gb"]),
        ("4060 Ti", ["rtx-4060-ti-8gb", "rtx-4060-ti-16gb"]),
        ("rtx 6000", ["quadro-rtx-6000", "rtx-6000-ada", "rtx-pro-6000"]),
        ("rxt-4090", ["rtx-4090"]),
        ("aa100", ["a100-40gb", "a100-80gb"]),
        ("rtx-409", ["rtx-4090"]),  # and the 4090 D, which has 24 GB too
        ("rtx-306", []),  # 8 or 12 GB
        ("3060 8gb", ["rtx-3060-ti"]),  # which has 8 GB
        ("rtx-4050", []),  # for each card of a near name has another memory
        ("rtx 4090 laptop", []),
        ("a100-60gb", []),
        ("mi300x", []),
        ("", []),
    ],
)
def test_what_may_be_meant_is_named_and_never_a_card_of_another_memory(written: str, offered: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        gpu_spec(written)
    (problem,) = raised.value.problems
    assert re.findall("'([^']*)'", problem.what.replace(f"'{written}'", "", 1)) == offered
    assert "`qwentune gpus` lists all" in problem.fix
    assert "24GiB" in problem.fix


@given(st.floats(1, 4096).map(lambda size: round(size, 3)), st.sampled_from(["GiB", "gib", " GiB", "GB"]))
def test_any_card_is_given_by_its_memory(size: float, unit: str) -> None:
    assume(unit != "GB" or size > 1.08)
    gpu = gpu_spec(f"{size:g}{unit}")
    assert gpu.total_bytes == int(float(f"{size:g}") * (10**9 if unit == "GB" else 2**30))
    assert gpu.rates_of is not None
    model = GPUS[gpu.rates_of]
    assert (gpu.bf16_tflops, gpu.bandwidth_gb_per_second) == (model.bf16_tflops, model.bandwidth_gb_per_second)
    assert model.name in rates_remark(gpu)


@pytest.mark.parametrize("size", ["0GiB", "0.5GiB", "9999GiB", "1" * 400 + "GiB", "-3GiB", "24GiB of it"])
def test_no_card_has_any_other_memory(size: str) -> None:
    with pytest.raises(UsageError):
        gpu_spec(size)
