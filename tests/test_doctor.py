"""`qwentune doctor` on this machine, and on others that are worse."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qwentune import machine
from qwentune.doctor import run_doctor
from qwentune.errors import EXIT_OK, UsageError
from qwentune.facts.gpus import gpu_spec
from qwentune.facts.present import PresentGpus
from qwentune.machine import Finding, findings

ROOT = Path(__file__).parents[1]


def found(about: str) -> list[Finding]:
    return [finding for finding in findings() if finding.about == about]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(machine, "PROBED_MIB", 1)


def test_a_machine_that_trains_has_nothing_to_be_mended(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor() == EXIT_OK
    printed = capsys.readouterr().out
    assert "bitsandbytes: " in printed
    assert "quantises on" in printed
    assert "HF_HUB_OFFLINE is set" in printed
    assert "fail" not in printed


def test_every_finding_that_is_not_well_says_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENTUNE_CAHCE", "/tmp")
    unwell = [finding for finding in findings() if finding.state != "ok"]
    assert unwell
    assert all(finding.mend for finding in unwell)
    assert Finding("warn", "QWENTUNE_CAHCE", "is read by nothing", "Did you mean 'QWENTUNE_CACHE'?") in unwell


@pytest.mark.parametrize(
    ("wanted", "state", "mend"),
    [
        ("numpy>=2", "ok", ""),
        ("numpy<1", "fail", "pip install 'numpy<1'"),
        ("no-such-package>=3", "fail", "pip install 'no-such-package>=3'"),
    ],
)
def test_packages_are_held_against_their_ranges(
    monkeypatch: pytest.MonkeyPatch, wanted: str, state: str, mend: str
) -> None:
    monkeypatch.setattr(machine, "requirements", lambda: [Requirement(wanted)])
    monkeypatch.setattr(machine, "tested_versions", dict[str, str])
    (first, *_) = [each for each in findings() if each.about in (wanted.split("<")[0].split(">")[0], "packages")]
    assert (first.state, first.mend) == (state, mend)


def test_another_version_than_the_tested_one_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "tested_versions", lambda: {"numpy": "1.0"})
    (warning,) = found("packages")
    assert warning.state == "warn"
    assert "(tested: 1.0)" in warning.what
    assert "pip install -c" in warning.mend


def test_a_card_that_nobody_tells_of_has_to_be_mended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "present_gpus", lambda: None)
    monkeypatch.setattr(machine, "may_have_gpu", lambda: True)
    assert run_doctor() == UsageError.exit_code
    assert "fail  GPU: something here says that there is an NVIDIA GPU" in capsys.readouterr().out


def test_a_card_beside_a_torch_that_does_not_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (gpu_spec("rtx-4090"), gpu_spec("t4"))
    monkeypatch.setattr(machine, "present_gpus", lambda: PresentGpus(cards))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [finding.state for finding in found("GPU")] == ["ok", "warn"]  # a T4 has no bf16
    (torch,) = found("torch")
    assert torch.state == "fail"
    (attention,) = found("attention")  # the weakest card decides
    assert attention.state == "warn"
    assert "compute capability 8.0" in attention.what


def test_a_cache_that_cannot_be_written_has_to_be_mended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "file" / "cache"))
    (cache,) = found("cache")
    assert cache.state == "fail"
    assert "QWENTUNE_CACHE" in cache.mend


@pytest.mark.parametrize(("speed", "state"), [(10.0, "warn"), (900.0, "ok")])
def test_a_slow_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch, speed: float, state: str) -> None:
    monkeypatch.setattr(machine, "written_mib_per_second", lambda _: speed)
    monkeypatch.setattr(machine, "LEAST_DISK_GIB", 0)
    (cache,) = found("cache")
    assert cache.state == state


def test_a_hub_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (hub,) = found("hub")
    assert hub.state == "warn"
    assert "127.0.0.1:9 does not answer" in hub.what


def test_a_library_that_cannot_quantise_has_to_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    (finding,) = found("bitsandbytes")
    assert finding.state == "fail"
    assert "no kernel image" in finding.what


def test_the_tested_versions_are_those_of_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [wanted for name, some in project["optional-dependencies"].items() if name != "test" for wanted in some]
    wanted = [Requirement(text) for text in (*project["dependencies"], *extras)]
    tested = machine.tested_versions()
    for requirement in wanted:
        if requirement.name in tested:
            assert tested[requirement.name] in requirement.specifier, requirement.name
    untested = {requirement.name for requirement in wanted} - tested.keys()
    assert untested <= {"qwentune", "ninja", "packaging"}
