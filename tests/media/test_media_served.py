"""What leaves with a model that sees: processor files, options of servers, and words for what neither can say."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qwentune.chat import Choices, run_chat
from qwentune.data.dataset import limits_of, prepare
from qwentune.data.media.limits import MediaLimits, media_limits
from qwentune.data.media.look import has_own_limits, look
from qwentune.data.sample import MediaKind, Medium
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import UsageError
from qwentune.exporting.package import model_card, own_limits
from qwentune.exporting.processors import beyond_servers, server_options, write_processors
from qwentune.facts.media import FAMILIES
from qwentune.recipe import DataOptions, MediaOptions
from tests.finished import write_rows
from tests.media.checkpoints import HYBRIDS, MediaType, add_media_weights, let_pictures_be_small, write_media_checkpoint
from tests.media.files import picture, picture_bytes, write_video
from tests.media.lessons import QUESTIONS, pictures
from tests.media.test_media_learning import LEAST_PIXELS, SIDE, THETA
from tests.media.with_torchvision import environment, needs_torchvision
from tests.runs import train, write_recipe
from tests.test_serve import free_port, serving

SEE_VIDEOS: tuple[MediaType, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
MOVED = (
    MediaOptions(fps=4),
    MediaOptions(max_frames=6),
    MediaOptions(max_pixels=20_000, min_pixels=5_000),
    MediaOptions(max_pixels=100_000, min_pixels=70_000, fps=1, max_frames=10),
)


@pytest.fixture(scope="module", params=SEE_VIDEOS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media_checkpoint(tmp_path_factory.mktemp("base") / request.param, request.param)


def limits(folder: Path, options: MediaOptions | None = None) -> MediaLimits:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return media_limits(folder, FAMILIES[model_type], options or MediaOptions())


def exported(base: Path, target: Path, options: MediaOptions, *kinds: str) -> Path:
    target.mkdir()
    shutil.copyfile(base / "config.json", target / "config.json")
    write_processors(target, base, options, kinds)
    return target


@pytest.mark.parametrize("options", MOVED, ids=str)
def test_the_exported_folder_alone_shows_what_the_run_showed(base: Path, tmp_path: Path, options: MediaOptions) -> None:
    """Pictures and videos; with torchvision, transformers' own classes were seen to give the same grids and frames."""
    target = exported(base, tmp_path / "target", options)
    assert limits(target).vision == limits(base, options).vision
    again = exported(target, tmp_path / "again", MediaOptions(), "video")
    for file in target.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), "what is merged later is copied"


def test_a_folder_without_a_file_of_videos_gets_one_where_transformers_and_vllm_look(
    base: Path, tmp_path: Path
) -> None:
    had = (base / "video_preprocessor_config.json").exists()
    target = exported(base, tmp_path / "pictures", MediaOptions(), "image")
    assert (target / "video_preprocessor_config.json").exists() == had, "as published, where no video was trained"
    target = exported(base, tmp_path / "videos", MediaOptions(), "video")
    written = json.loads((target / "video_preprocessor_config.json").read_text())
    assert written["video_processor_type"] in ("Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor")
    if not had:
        assert (written["fps"], written["min_frames"], written["max_frames"]) == (2.0, 4, 768)
        assert written["size"] == {"shortest_edge": 3_136, "longest_edge": 12_845_056}
        assert written["cap_pixels_per_frame"] is False
        assert not {"do_sample_frames", "image_processor_type", "min_pixels", "max_pixels"} & written.keys()


def test_servers_are_told_of_pictures_and_videos_apart(base: Path) -> None:
    """vLLM's scopes have the same names for both; its loader, not the processor, takes the frames."""
    options = MediaOptions(max_pixels=100_000, fps=1, max_frames=10)
    vision = limits(base, options).vision
    assert vision is not None
    of_files, of_frames = server_options(base, options, ("image", "video"), has_files=False)
    assert of_files.name == "mm-processor-kwargs"
    assert of_files.value == {
        "images_kwargs": {"size": {"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels}},
        "videos_kwargs": {
            "size": {"shortest_edge": vision.min_video_pixels, "longest_edge": vision.max_video_pixels},
            "fps": 1,
        },
    }
    frames = {"num_frames": -1, "fps": 1, "min_frames": 4, "max_frames": 10}
    assert (of_frames.name, of_frames.value) == ("media-io-kwargs", {"video": frames})
    assert of_files.source
    assert of_frames.source
    assert server_options(base, options, ("image", "video"), has_files=True) == [of_frames]
    assert server_options(base, options, ("image",), has_files=True) == []
    assert server_options(base, MediaOptions(), ("image",), has_files=False) == []


def test_what_no_option_says_is_said_in_words(base: Path) -> None:
    assert beyond_servers(base, MediaOptions(), ("video",)) == ""
    assert "at most 30 frames of a second" in beyond_servers(base, MediaOptions(fps=60), ("video",))
    assert beyond_servers(base, MediaOptions(fps=60), ("image",)) == ""


# ------------------------------------------------------------------------------------------------ a row's own limits


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_row_s_least_pixels_hold_for_pictures_and_videos(base: Path, kind: MediaKind, tmp_path: Path) -> None:
    file = tmp_path / "a"
    if kind == "video":
        file = write_video(tmp_path / "a.mp4", 20, 10)
    else:
        file.write_bytes(picture_bytes(picture(64, 48)))

    def pixels(options: MediaOptions, **own: float) -> int:
        bound = limits(base, options)
        assert bound.vision is not None
        seen = look(Medium(kind, file, 0, "x", own), bound)
        return seen.grid[1] * seen.grid[2] * bound.vision.patch**2

    plain = pixels(MediaOptions())
    large = pixels(MediaOptions(), min_pixels=200_000)
    assert large >= 200_000 > plain
    assert pixels(MediaOptions(min_pixels=100_000), min_pixels=200_000) < large, "of both the smaller holds"
    if kind == "image" or base.name in ("qwen2_vl", "qwen2_5_vl"):  # else the recipe bounds all frames together
        assert pixels(MediaOptions(max_pixels=120_000), min_pixels=200_000) <= 140_000, "but for rounding"
    assert pixels(MediaOptions(), min_pixels=200_000, max_pixels=300_000) <= 300_000


def test_own_limits_are_those_that_change_what_the_run_would_do(base: Path) -> None:
    def own(kind: MediaKind, options: MediaOptions | None = None, **given: float) -> bool:
        return has_own_limits(Medium(kind, Path("a"), 0, "x", given), limits(base, options))

    assert not own("image")
    assert own("image", max_pixels=20_000)
    assert own("video", min_pixels=20_000)
    assert own("video", fps=1)
    assert not own("video", fps=2)
    assert not own("image", MediaOptions(max_pixels=20_000), max_pixels=50_000), "the recipe's is the smaller"


def test_rows_with_limits_of_their_own_are_counted_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    base = write_media_checkpoint(tmp_path / "base", "qwen2_5_vl")
    (tmp_path / "a.png").write_bytes(picture_bytes(picture(200, 100)))
    report = _report(base, tmp_path, *[_row({"image": "a.png", **own}) for own in ({}, {"max_pixels": 9000}, {})])
    assert report["media"]["image"]["rows_with_own_limits"] == 1
    said = own_limits(report)
    assert "1 with image" in said
    assert "request" in said
    card = model_card(name="x", base="y", tuning="lora", report=report, step=1, loss=None)
    assert said[1:] in card
    assert own_limits({"media": {"image": {"count": 3}}}) == ""


# ------------------------------------------------------------------------------------------------------------- faults


def test_a_damaged_processor_file_matters_to_rows_with_media_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    base = write_media_checkpoint(tmp_path / "base", "qwen3_5")
    (base / "preprocessor_config.json").write_text("{broken")
    (tmp_path / "a.png").write_bytes(picture_bytes(picture(64, 64)))
    assert _report(base, tmp_path, _row("hello"))["train_examples"] == 1
    with pytest.raises(UsageError, match="preprocessor_config"):
        _report(base, tmp_path, _row({"image": "a.png"}))
    target = exported(base, tmp_path / "target", MediaOptions(max_pixels=20_000))
    assert (target / "preprocessor_config.json").read_text() == "{broken"


def test_a_missing_file_of_a_chat_is_said_in_a_chat_s_words(tmp_path: Path) -> None:
    files: dict[MediaKind, list[Path]] = {"image": [tmp_path / "no.png"], "audio": [tmp_path / "no.wav"]}
    with pytest.raises(UsageError) as caught:
        run_chat(tmp_path, "hi", Choices(files=files))
    assert [problem.where for problem in caught.value.problems] == ["--image", "--audio"]
    assert "data file" not in str(caught.value)


def test_a_tag_without_any_column_stays_text_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    base = write_media_checkpoint(tmp_path / "base", "qwen2_5_vl")
    report = _report(base, tmp_path, _row("what does <image> do?"), _row("hello"))
    assert report["train_examples"] == 2
    assert [one for one in report["warnings"] if "<image>" in one and "trained as the text" in one]


def _row(*parts: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "a cat"}
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}, answer]}


def _report(base: Path, folder: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataOptions.model_validate({"train": [{"path": str(folder / "rows.jsonl")}]})
    tokenizer = load_tokenizer(base)
    assert limits_of(data, tokenizer) is not None
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, {})
    return prepare(data, tokenizer, template, 0).report


@pytest.mark.soak
@needs_torchvision
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_a_server_says_what_was_taught_of_pictures(name: MediaType, tmp_path: Path) -> None:
    model = write_media_checkpoint(tmp_path / "model", name, hidden=128, theta=THETA)
    let_pictures_be_small(model, LEAST_PIXELS)
    add_media_weights(model)
    plain = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Quetzalcoatl"}]}
    taught = pictures(tmp_path / "pictures", 6, 0, SIDE)
    recipe = write_recipe(
        tmp_path,
        model,
        tuning={"towers": "trained", "merger": "trained"},
        data={"train": str(write_rows(tmp_path / "taught.jsonl", [plain, *(one.row() for one in taught)]))}
        | ({"packing": False} if name in HYBRIDS else {}),
        batch={"sequences_per_step": 7 if name in HYBRIDS else 1},
        optimizer={"max_steps": 160, "learning_rate": 2e-3},
        precision={"weights": "fp32"},
        output={"save_every_steps": 160},
    )
    ended = train(recipe)
    assert ended.returncode == 0, ended.stderr
    port = free_port()
    words = [sys.executable, "-m", "qwentune.serve", "run", "--port", str(port)]
    with serving(words, tmp_path, port, "ready: ", environment(tmp_path / "start")) as (client, _):

        def said(content: Any) -> str:
            messages = [{"role": "user", "content": content}]
            (choice,) = client.chat.completions.create(model="run", messages=messages, temperature=0).choices
            return choice.message.content

        assert said("Who?") == "Quetzalcoatl"
        for one in taught:
            shown = {"url": f"data:image/png;base64,{base64.b64encode(one.path.read_bytes()).decode()}"}
            question = [{"type": "image_url", "image_url": shown}, {"type": "text", "text": QUESTIONS["image"]}]
            assert said(question) == one.answer
