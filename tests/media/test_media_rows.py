"""Rows with pictures, videos and sounds: every convention means the same, every fault of a file is said in words, and
what is loaded is what the published processors make of it."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessorPil, WhisperFeatureExtractor

from qwentune.data.formats.samples import read_samples
from qwentune.data.media.limits import MediaLimits, media_limits
from qwentune.data.media.load import colours, load
from qwentune.data.media.look import look
from qwentune.data.media.seen import Seen
from qwentune.data.media.sounds import waveform
from qwentune.data.media.videos import Film, frames_taken
from qwentune.data.sample import Conversation, MediaKind, Medium, Pair, RowError
from qwentune.errors import Problem, UsageError
from qwentune.facts.media import FAMILIES
from qwentune.recipe import MediaOptions
from tests.media.files import picture, picture_bytes, sound_bytes, write_video

VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen2_5_omni", "qwen3_omni_moe")
PICTURE = picture_bytes(picture(40, 30))
SOUND = sound_bytes(0.5)
ANSWER = {"role": "assistant", "content": "a cat"}


def limits(family: str = "qwen2_5_vl", folder: Path | None = None, **options: Any) -> MediaLimits:
    return media_limits(folder, FAMILIES[family], MediaOptions(**options))


def medium(content: Any, kind: MediaKind = "image", **own: float) -> Medium:
    return Medium(kind, content, 0, "images[0]", own)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with a picture, a sound and a data file's place."""
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "b.png").write_bytes(picture_bytes(picture(30, 40, seed=1)))
    (tmp_path / "a.wav").write_bytes(SOUND)
    (tmp_path / "a.mp4").write_bytes(b"looked at later")
    return tmp_path


def read(folder: Path, row: dict[str, Any], format: str = "auto") -> Any:
    """The sample of a row that stands in a file of the folder, or its faults."""
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    problems: list[Problem] = []
    samples = list(read_samples(str(folder / "rows.jsonl"), format, problems))
    return samples[0] if samples else [f"{one.what} {one.fix}" for one in problems]


def meant(sample: Conversation | list[str]) -> list[Any]:
    """The texts of the messages and what stands between them, bytes of a file as its path's are."""
    assert isinstance(sample, Conversation), sample
    return [
        (
            message.role,
            message.content,
            [(one.kind, one.at, _bytes(one.content), dict(one.limits)) for one in message.media],
        )
        for message in sample.messages
    ]


def _bytes(content: Any) -> Any:
    return content.read_bytes() if isinstance(content, Path) else content


def part(**fields: Any) -> dict[str, Any]:
    return fields


def chat(*parts: Any, **beside: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **beside}


TEXT = part(type="text", text="what is it?")
B64 = base64.b64encode(PICTURE).decode()
CONVENTIONS: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": [{"role": "user", "content": "<image>what is it?"}, ANSWER], "images": ["a.png"]},
    "ms-swift, one": {"messages": [{"role": "user", "content": "<image>what is it?"}, ANSWER], "image": "a.png"},
    "ms-swift, query": {"query": "<image>what is it?", "response": "a cat", "images": ["a.png"]},
    "alpaca": {"instruction": "<image>what is it?", "input": "", "output": "a cat", "images": ["a.png"]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": "a cat"}],
        "images": [{"path": "a.png", "bytes": None}],
    },
    "Qwen's script": {
        "image": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": "a cat"}],
    },
    "OpenAI": chat(part(type="image_url", image_url={"url": f"data:image/png;base64,{B64}", "detail": "low"}), TEXT),
    "OpenAI responses": chat(part(type="input_image", image_url=f"data:image/png;base64,{B64}"), TEXT),
    "vLLM, a file": chat(part(type="image_url", image_url={"url": "file://FOLDER/a.png"}), TEXT),
    "Qwen": chat(part(type="image", image="a.png"), TEXT),
    "Qwen without types": chat(part(image="a.png"), part(text="what is it?")),
    "transformers": chat(part(type="image", path="a.png"), TEXT),
    "transformers, base64": chat(part(type="image", base64=B64), TEXT),
    "Anthropic": chat(part(type="image", source={"type": "base64", "media_type": "image/png", "data": B64}), TEXT),
    "TRL": chat(part(type="image"), TEXT, images=["a.png"]),
    "TRL, one by one": {
        "prompt": [{"role": "user", "content": [part(type="image"), TEXT]}],
        "completion": [ANSWER],
        "image": "a.png",
    },
    "parts as texts of JSON": chat(json.dumps(part(type="image", image="a.png")), json.dumps(TEXT)),
    "nulls of Arrow": chat(
        part(type="image", image="a.png", text=None, video=None), part(type="text", text="what is it?", image=None)
    ),
    "a table's text": {"messages": chat(TEXT)["messages"] and json.dumps(chat(part(image="a.png"), TEXT)["messages"])},
    "a logged call": {
        "request": {"messages": chat(part(type="image", image="a.png"), TEXT)["messages"][:1]},
        "response": {"choices": [{"message": ANSWER}]},
    },
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_convention_means_the_same(rows: Path, name: str) -> None:
    row = json.loads(json.dumps(CONVENTIONS[name]).replace("FOLDER", str(rows)))
    expected = [("user", "what is it?", [("image", 0, PICTURE, {})]), ("assistant", "a cat", [])]
    assert meant(read(rows, row)) == expected


@pytest.mark.parametrize(("name", "family"), [("image", "qwen3_vl"), ("video", "qwen2_5_vl"), ("audio", "qwen2_audio")])
def test_the_shipped_rows_with_media_can_be_seen_and_heard_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, family: str
) -> None:
    monkeypatch.chdir(tmp_path)
    problems: list[Problem] = []
    samples = list(read_samples(f"data_templates/{name}.jsonl", "auto", problems))
    assert problems == []
    media = [one for sample in samples if isinstance(sample, Conversation) for m in sample.messages for one in m.media]
    assert len(media) >= len(samples)
    for one in media:
        assert one.kind == name
        assert load(look(one, limits(family)), limits(family)).size


def test_bytes_in_parquet_are_the_picture(rows: Path) -> None:
    messages = [{"role": "user", "content": "look: <image>"}, ANSWER]
    table = pyarrow.Table.from_pylist([{"messages": messages, "images": [{"bytes": PICTURE, "path": None}]}])
    pyarrow.parquet.write_table(table, rows / "rows.parquet")
    problems: list[Problem] = []
    (sample,) = read_samples(str(rows / "rows.parquet"), "auto", problems)
    assert problems == []
    assert meant(sample)[0] == ("user", "look: ", [("image", 6, PICTURE, {})])


def test_bytes_of_a_hub_dataset_are_kept_as_they_are(monkeypatch: pytest.MonkeyPatch, rows: Path) -> None:
    import datasets

    messages = [{"role": "user", "content": "<image>what is it?"}, ANSWER]
    features = {"images": datasets.Sequence(datasets.Image())}
    given = datasets.Dataset.from_dict(
        {"images": [[{"bytes": PICTURE, "path": None}]]}, features=datasets.Features(features)
    )
    given = given.add_column("messages", [messages])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: given)
    problems: list[Problem] = []
    (sample,) = read_samples("owner/pictures", "auto", problems)
    assert meant(sample)[0] == ("user", "what is it?", [("image", 0, PICTURE, {})])


def test_sounds_and_videos_come_in_the_same_ways(rows: Path) -> None:
    data = base64.b64encode(SOUND).decode()
    for sound in (
        part(type="input_audio", input_audio={"data": data, "format": "wav"}),
        part(type="audio_url", audio_url={"url": "a.wav"}),
        part(type="audio", audio_url="a.wav"),
        part(audio="a.wav"),
    ):
        assert meant(read(rows, chat(TEXT, sound)))[0][2] == [("audio", len("what is it?"), SOUND, {})]
    tagged = {"messages": [{"role": "user", "content": "<audio>\n<video>"}, ANSWER], "audios": ["a.wav"]}
    found = meant(read(rows, {**tagged, "videos": ["a.mp4"]}))[0]
    assert found == ("user", "\n", [("audio", 0, SOUND, {}), ("video", 1, b"looked at later", {})])
    film = part(type="video", video=["a.png", "b.png"], fps=1.0, max_pixels=1000)
    ((kind, _, frames, own),) = meant(read(rows, chat(film)))[0][2]
    assert (kind, [_bytes(frame) for frame in frames], own) == (
        "video",
        [PICTURE, (rows / "b.png").read_bytes()],
        {"max_pixels": 1000, "fps": 1.0},
    )


def test_the_kth_tag_takes_the_kth_item_in_all_messages(rows: Path) -> None:
    messages = [
        {"role": "user", "content": "<image>x<image>"},
        ANSWER,
        {"role": "user", "content": "y <image>"},
        ANSWER,
    ]
    sample = read(rows, {"messages": messages, "images": ["a.png", "b.png", "a.png"]})
    places = [(one.at, Path(one.content).name, one.where) for message in sample.messages for one in message.media]
    assert places == [(0, "a.png", "images[0]"), (1, "b.png", "images[1]"), (2, "a.png", "images[2]")]


def test_a_pair_shares_the_picture_of_its_prompt(rows: Path) -> None:
    prompt = [{"role": "user", "content": "<image>what is it?"}]
    pair = read(rows, {"prompt": prompt, "chosen": "a cat", "rejected": "a dog", "images": ["a.png"]})
    assert isinstance(pair, Pair)
    assert pair.chosen.messages[0] == pair.rejected.messages[0]
    assert [one.at for one in pair.chosen.messages[0].media] == [0]


def test_a_tag_without_a_column_is_text(rows: Path) -> None:
    row = {"messages": [{"role": "user", "content": "what does <image> do in HTML?"}, ANSWER]}
    assert meant(read(rows, row))[0] == ("user", "what does <image> do in HTML?", [])


def test_tags_and_items_must_agree_where_the_file_has_a_column_of_media(rows: Path) -> None:
    """Empty, null or of another kind: a tag without an item is no text. What the assistant says may be HTML."""
    plain = {"messages": [{"role": "user", "content": "<image>what is it?"}, ANSWER]}
    for beside in ({"images": []}, {"images": None}, {"image": ""}, {"audios": []}):
        said = read(rows, {**plain, **beside})
        assert isinstance(said, list), beside
        assert "the row has 0 image items and 1 <image> " in said[0]
        assert "Give its items in images" in said[0]
    html = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<video>"}], "videos": []}
    assert meant(read(rows, html))[1] == ("assistant", "<video>", [])
    named = chat(part(image="a.png"), part(text="in <image>?"), images=[])
    assert meant(read(rows, named))[0][1] == "in <image>?"

    (rows / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (plain, CONVENTIONS["ms-swift"], plain)))
    problems: list[Problem] = []
    assert len(list(read_samples(str(rows / "rows.jsonl"), "auto", problems))) == 1
    assert [one.where.rpartition(":")[2] for one in problems] == ["1", "3"]


PARTS = [part(type="image", image="a.png"), TEXT]
PACKED: dict[str, dict[str, Any]] = {
    "a content": {"messages": [{"role": "user", "content": json.dumps(PARTS)}, ANSWER]},
    "all contents": {
        "messages": [{"role": "user", "content": json.dumps(PARTS)}, {**ANSWER, "content": json.dumps("a cat")}]
    },
    "all contents, as parts": {
        "messages": [
            {"role": "user", "content": json.dumps(PARTS)},
            {**ANSWER, "content": json.dumps([part(type="text", text="a cat")])},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": json.dumps(PARTS)}, {"from": "gpt", "value": "a cat"}]},
    "a prompt": {"prompt": [{"role": "user", "content": json.dumps(PARTS)}], "completion": [ANSWER]},
    "a column": {**CONVENTIONS["ms-swift"], "images": json.dumps(["a.png"])},
    "a column of one": {**CONVENTIONS["ms-swift"], "images": json.dumps({"path": "a.png"})},
    "items of a column": {**CONVENTIONS["ms-swift"], "images": [json.dumps({"path": "a.png"})]},
    "items that are texts": {**CONVENTIONS["ms-swift"], "images": [json.dumps("a.png")]},
    "a source": chat(part(type="image", image=json.dumps({"path": "a.png"})), TEXT),
}


@pytest.mark.parametrize("name", PACKED)
def test_texts_of_json_mean_what_they_hold(rows: Path, name: str) -> None:
    assert meant(read(rows, PACKED[name])) == meant(read(rows, CONVENTIONS["Qwen"]))


def test_a_text_that_only_looks_like_parts_is_a_text(rows: Path) -> None:
    answer = json.dumps([part(type="text", text="a cat")])
    row = {"messages": [{"role": "user", "content": json.dumps([TEXT])}, {"role": "assistant", "content": answer}]}
    assert meant(read(rows, row)) == [("user", json.dumps([TEXT]), []), ("assistant", answer, [])]


def test_what_datasets_writes_where_contents_differ_is_read_back(rows: Path) -> None:
    """Its Parquet says which texts are JSON: the plain ones have quotes there, which no one wrote."""
    kind = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.json_())]))
    contents = ["see", PARTS, "a cat"]
    messages = [
        {"role": role, "content": json.dumps(content)}
        for role, content in zip(("system", "user", "assistant"), contents, strict=True)
    ]
    storage = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    table = pyarrow.table({"messages": pyarrow.array([messages], storage).cast(kind)})
    pyarrow.parquet.write_table(table, rows / "rows.parquet")
    problems: list[Problem] = []
    (sample,) = read_samples(str(rows / "rows.parquet"), "auto", problems)
    assert meant(sample)[1:] == meant(read(rows, CONVENTIONS["Qwen"]))  # type: ignore[arg-type]
    assert meant(sample)[0][1] == "see"  # type: ignore[arg-type]


def test_a_path_is_looked_for_beside_the_data_file_first(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = rows / "elsewhere"
    elsewhere.mkdir()
    for name in ("a.png", "here.png"):
        (elsewhere / name).write_bytes(b"here")
    monkeypatch.chdir(elsewhere)
    assert meant(read(rows, chat(part(image="a.png"))))[0][2][0][2] == PICTURE
    assert meant(read(rows, chat(part(image="here.png"))))[0][2][0][2] == b"here"


IN_ROWS: list[tuple[dict[str, Any], str]] = [
    ({**CONVENTIONS["ms-swift"], "images": ["a.png", "b.png"]}, "the row has 2 image items and 1 <image> Write one"),
    ({**CONVENTIONS["ms-swift"], "image": "b.png"}, "the row has images and image"),
    (chat(TEXT, images=["a.png"]), "the row has 1 image items and 0 <image>s"),
    (chat(part(type="image"), TEXT), "the row has 0 image items and 1 unnamed part"),
    (chat(part(type="image", image="http://x/y/cat.png?k=1")), "curl -fL --create-dirs -o media/cat.png 'http://x/y/"),
    (chat(part(image="s3://bucket/cat.png")), "is an address: the text 's3://bucket/cat.png' Nothing is fetched"),
    (chat(part(type="image", image="a.png", path="b.png")), "has image and path Keep the one"),
    (chat(part(type="image", image=7)), "messages[0].content[0].image is the number 7"),
    (chat(part(type="image", image="data:image/png;base64,@@@@")), "is no base64"),
    (chat(part(type="image", image="data:image/png,abc")), "Write data:;base64,"),
    (chat(part(type="image", image="a.png", resized_height=28)), "has resized_height"),
    (chat(part(type="image", image="a.png", max_pixels="many")), "max_pixels is the text 'many'"),
    (chat(part(type="image", image="a.png", max_pixels=0.5)), "max_pixels is the number 0.5"),
    (chat(part(type="document", path="a.pdf")), "is of the type 'document'"),
    ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [part(image="a.png")]}]},
     "messages[1].content[0] is an image in what the assistant says"),
    ({"query": "hi", "response": "<image>", "images": ["a.png"]},
     "the assistant says <image>, for which the row has a column"),
    ({"messages": [{"role": "user", "content": "hi", "images": ["a.png"]}, ANSWER]}, "messages[0] has images"),
    ({"text": "a text", "images": ["a.png"]}, "the row has images Media belong to dialogues"),
    (chat(TEXT, objects={"bbox": []}), "the row has objects"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "fault"), IN_ROWS, ids=[fault for _, fault in IN_ROWS])
def test_what_a_row_says_wrongly_is_refused_by_name(rows: Path, row: dict[str, Any], fault: str) -> None:
    said = read(rows, row)
    assert isinstance(said, list), said
    assert any(fault in one for one in said), said


# ---------------------------------------------------------------------------------------------------- broken files


def wav(**fields: Any) -> bytes:
    return sound_bytes(**{"seconds": 0.5, **fields})


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    return picture_bytes(image, format, **options)


def sixteen_bits() -> bytes:
    return saved(Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)))


def bomb() -> bytes:
    """A PNG of a header that promises 20,000 × 20,000 pixels."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(head))
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + PICTURE[33:]
    )


def animated(format: str) -> bytes:
    frames = [picture(20, 20, seed) for seed in range(3)]
    return saved(frames[0], format, save_all=True, append_images=frames[1:])


def floats(*values: float) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.asarray(values * 3000, dtype=np.float32), 16000, format="WAV", subtype="FLOAT")
    return stream.getvalue()


JPEG = saved(picture(64, 64), "JPEG")
WEBP = saved(picture(64, 64), "WEBP", lossless=True)
BROKEN_FILES: dict[str, tuple[MediaKind, Callable[[], bytes], str]] = {
    "empty picture": ("image", lambda: b"", "the file is empty"),
    "text": ("image", lambda: b"hello there, this is no picture", "no picture of a known kind"),
    "zeros": ("image", lambda: b"\0" * 500, "no picture of a known kind"),
    "head of a PNG": ("image", lambda: PICTURE[:8], "broken"),
    "half a PNG": ("image", lambda: PICTURE[: len(PICTURE) // 2], "broken"),
    "PNG without its end": ("image", lambda: PICTURE[:-12], "broken"),
    "PNG with a wrong checksum": ("image", lambda: PICTURE[:60] + b"\xaa\xbb" + PICTURE[62:], "broken"),
    "head of a JPEG": ("image", lambda: JPEG[:4], "broken|no picture"),
    "half a JPEG": ("image", lambda: JPEG[: len(JPEG) // 2], "broken: image file is truncated"),
    "JPEG without its end": ("image", lambda: JPEG[:-40], "broken: image file is truncated"),
    "half a WEBP": ("image", lambda: WEBP[: len(WEBP) // 2], "broken|no picture"),
    "half a BMP": ("image", lambda: saved(picture(64, 64), "BMP")[:3000], "broken: image file is truncated"),
    "half a TIFF": ("image", lambda: saved(picture(64, 64), "TIFF")[:3000], "broken"),
    "half a GIF": ("image", lambda: saved(picture(64, 64), "GIF")[:1500], "broken"),
    "bomb": ("image", bomb, "more than 178,956,970 pixels"),
    "animated GIF": ("image", lambda: animated("GIF"), "it has 3 frames"),
    "animated PNG": ("image", lambda: animated("PNG"), "it has 3 frames"),
    "animated WEBP": ("image", lambda: animated("WEBP"), "it has 3 frames"),
    "pages of a TIFF": ("image", lambda: animated("TIFF"), "it has 3 frames"),
    "16-bit grey": ("image", sixteen_bits, "mode I;16"),
    "32-bit grey": ("image", lambda: saved(Image.new("F", (20, 20)), "TIFF"), "mode F"),
    "strip": ("image", lambda: saved(picture(402, 2)), "402×2, and no side"),
    "LFS pointer": ("image", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "git lfs pull"),
    "web page": ("image", lambda: b"\n<!DOCTYPE html><html>", "it is a web page"),
    "SVG": ("image", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a drawing in SVG"),
    "PDF": ("image", lambda: b"%PDF-1.7", "it is a PDF"),
    "sound for a picture": ("image", lambda: SOUND, "no picture of a known kind"),
    "empty sound": ("audio", lambda: b"", "the file is empty"),
    "text for a sound": ("audio", lambda: b"la la la", "no sound that can be read"),
    "picture for a sound": ("audio", lambda: PICTURE, "no sound that can be read"),
    "head of a WAV": ("audio", lambda: SOUND[:30], "no sound that can be read|0.000 s"),
    "WAV without samples": ("audio", lambda: wav(seconds=0), "0.000 s, and at least 0.1 s"),
    "half a FLAC": ("audio", lambda: wav(format="FLAC")[:4000], "no sound that can be read|breaks off"),
    "short clip": ("audio", lambda: wav(seconds=0.05), "it lasts 0.050 s"),
    "not a number": ("audio", lambda: floats(0.5, float("nan")), "no finite numbers"),
    "infinite": ("audio", lambda: floats(0.5, float("inf")), "no finite numbers"),
    "slow rate": ("audio", lambda: wav(seconds=9, rate=500), "500 samples a second"),
    "long clip": ("audio", lambda: wav(seconds=30.5, rate=2000), "hears the first 30 s"),
    "empty video": ("video", lambda: b"", "the file is empty"),
    "text for a video": ("video", lambda: b"moving pictures", "no video that can be read"),
    "sound for a video": ("video", lambda: SOUND, "it holds no video"),
}  # fmt: skip


@pytest.mark.fault("N95", "what is wrong with the file, its place in the row, and a mend; exit 3, or the row left out")
@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_said_in_words_with_its_place_and_a_mend(tmp_path: Path, name: str) -> None:
    kind, content, wanted = BROKEN_FILES[name]
    file = tmp_path / "medium"
    file.write_bytes(content())
    with pytest.raises(RowError) as caught:
        look(medium(file, kind), limits("qwen2_audio" if kind == "audio" else "qwen2_5_vl"))
    assert caught.value.what.startswith(f"images[0], '{file}': ")
    assert any(words in caught.value.what + caught.value.fix for words in wanted.split("|")), caught.value.what
    assert caught.value.fix


def test_broken_files_are_at_least_forty() -> None:
    assert len(BROKEN_FILES) >= 40


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gone.png", "there is no such file"),
        ("", "a folder"),
        ("x" * 300, "a name too long"),
        ("a\0b", "null character"),
    ],
)
def test_what_is_no_file_is_said_too(tmp_path: Path, name: str, wanted: str) -> None:
    with pytest.raises(RowError, match=wanted):
        look(medium(tmp_path / name), limits())


def test_a_kind_that_a_model_does_not_take_is_refused_with_those_that_do() -> None:
    for family, kind, takes in (("qwen2_vl", "audio", "image and video only"), ("qwen2_audio", "image", "audio only")):
        with pytest.raises(RowError, match=takes) as caught:
            look(medium(b"x", kind), limits(family))
        assert "qwen3_omni_moe" in caught.value.fix
    with pytest.raises(RowError, match="takes text only"):
        look(medium(b"x"), None)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module, kind, extra, family in (
        ("PIL.Image", "image", "vision", "qwen2_vl"),
        ("soxr", "audio", "audio", "qwen2_audio"),
        ("av", "video", "video", "qwen2_vl"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RowError) as caught:
            look(medium(b"x" * 50, kind), limits(family))
        assert caught.value.fix == f"pip install 'qwentune[{extra}]'"
        monkeypatch.undo()
        monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))


# --------------------------------------------------------------------------------------- equal to the processors


def processor(family: str, **size: int) -> Any:
    vision = FAMILIES[family].vision
    assert vision is not None
    edges = {"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels, **size}
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch, image_mean=list(vision.mean), image_std=list(vision.std), size=edges
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(VL),
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    mode=st.sampled_from(["RGB", "L", "RGBA", "CMYK"]),
)
def test_pixels_grids_and_counts_are_those_of_the_published_processor(
    family: str, width: int, height: int, mode: str
) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    image = picture(width, height, mode=mode)
    content = picture_bytes(image, "TIFF" if mode == "CMYK" else "PNG")
    made = processor(family, longest_edge=100_000)(images=[image], return_tensors="np")
    bound = limits(family, max_pixels=100_000)
    seen = look(medium(content), bound)
    assert [list(seen.grid)] == made["image_grid_thw"].tolist()
    assert seen.num_tokens == int(np.prod(seen.grid)) // 4
    np.testing.assert_array_equal(load(seen, bound), made["pixel_values"])


@pytest.mark.parametrize(
    ("size", "old", "new"),
    [((640, 480), 391, 300), ((224, 224), 64, 64), ((1000, 30), 36, 94), ((4000, 3000), 15301, 11750)],
)
def test_counts_of_the_published_limits(size: tuple[int, int], old: int, new: int) -> None:
    content = picture_bytes(Image.new("RGB", size), "JPEG")
    assert look(medium(content), limits("qwen2_vl")).num_tokens == old
    assert look(medium(content), limits("qwen3_vl")).num_tokens == new


def test_a_picture_is_turned_as_exif_says() -> None:
    image = picture(128, 64)
    turned = Image.Exif()
    turned[0x0112] = 6
    seen = look(medium(picture_bytes(image, "PNG", exif=turned)), limits())
    plain = look(medium(picture_bytes(image.transpose(Image.Transpose.ROTATE_270))), limits())
    assert (seen.original, seen.grid) == (plain.original, plain.grid) == ((64, 128), plain.grid)
    np.testing.assert_array_equal(load(seen, limits()), load(plain, limits()))


def test_two_pictures_of_one_size_differ_and_a_copy_does_not(tmp_path: Path) -> None:
    first, again, other = (look(medium(picture_bytes(picture(40, 30, seed))), limits()) for seed in (0, 0, 1))
    (tmp_path / "a.png").write_bytes(PICTURE)
    assert first == again == look(medium(tmp_path / "a.png"), limits())
    assert first != other
    assert Seen.of_json(json.loads(json.dumps(first.as_json()))) == first


def test_of_the_row_s_limit_and_the_recipe_s_the_smaller_holds() -> None:
    content = picture_bytes(picture(400, 300))
    tokens = [
        look(medium(content, **own), limits(**recipe)).num_tokens * 28 * 28
        for own, recipe in (({}, {}), ({"max_pixels": 30_000}, {}), ({}, {"max_pixels": 30_000}))
    ]
    assert tokens[0] > 100_000
    assert tokens[1] == tokens[2] <= 30_000
    both = look(medium(content, max_pixels=50_000), limits(max_pixels=30_000))
    assert both == look(medium(content, max_pixels=30_000), limits(max_pixels=50_000))


def test_a_file_that_changes_after_it_was_looked_at_is_drift(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(PICTURE)
    seen = look(medium(file), limits())
    file.write_bytes(picture_bytes(picture(40, 30, seed=1)))
    with pytest.raises(RowError, match="has changed since"):
        load(seen, limits())
    file.unlink()
    with pytest.raises(RowError, match="cannot be read"):
        load(seen, limits())


# ---------------------------------------------------------------------------------------------- limits of a folder


def test_limits_are_those_of_the_folder_s_own_files(tmp_path: Path) -> None:
    def write(name: str, value: Any) -> None:
        (tmp_path / name).write_text(json.dumps(value))

    write("preprocessor_config.json", {"min_pixels": 784, "max_pixels": 7840, "image_mean": [0, 0, 0]})
    write("config.json", {"vision_config": {"tokens_per_second": 4}})
    vision = limits(folder=tmp_path).vision
    assert vision is not None
    assert (vision.min_pixels, vision.max_pixels, vision.max_video_pixels) == (784, 7840, 7840)
    assert (vision.mean, vision.tokens_per_second) == ((0, 0, 0), 4)
    write("video_preprocessor_config.json", {"size": {"shortest_edge": 784, "longest_edge": 1568}, "fps": 1})
    vision = limits(folder=tmp_path).vision
    assert vision is not None
    assert (vision.max_pixels, vision.max_video_pixels, vision.fps) == (7840, 1568, 1)
    write("processor_config.json", {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 3136}}})
    vision = limits(folder=tmp_path).vision
    assert vision is not None
    assert vision.max_pixels == 3136
    for wrong, said in (({"max_pixels": "x"}, "a number above 0"), ({"resample": 2}, "prepared with 3")):
        write("processor_config.json", {"image_processor": wrong})
        with pytest.raises(UsageError, match=said):
            limits(folder=tmp_path)


def test_without_files_the_published_limits_hold(tmp_path: Path) -> None:
    for name, family in FAMILIES.items():
        found = limits(name, tmp_path)
        assert (found.vision, found.hearing) == (family.vision, family.hearing)


# --------------------------------------------------------------------------------------------------------- sounds

HEARS = ("qwen2_audio", "qwen2_5_omni", "qwen3_omni_moe")


@pytest.mark.parametrize("seconds", [0.11, 1.0, 3.21, 29.997])
@pytest.mark.parametrize("family", HEARS)
def test_mel_features_are_those_of_whispers_extractor(family: str, seconds: float) -> None:
    seen = look(medium(sound_bytes(seconds), "audio"), limits(family))
    wave, _ = soundfile.read(io.BytesIO(sound_bytes(seconds)), dtype="float32")
    options = {"padding": "max_length"} if family == "qwen2_audio" else {"padding": True, "truncation": False}
    made = WhisperFeatureExtractor(128)(
        wave, sampling_rate=16000, return_tensors="np", return_attention_mask=True, **options
    )
    np.testing.assert_array_equal(load(seen, limits(family)), made["input_features"][0])
    assert seen.grid == (int(made["attention_mask"].sum()), 0, 0)


@pytest.mark.parametrize(
    ("seconds", "tokens"),
    [(1.0, (25, 25, 13)), (3.21, (80, 80, 42)), (30.0, (750, 750, 390)), (45.5, (None, 1137, 592))],
)
def test_pads_of_sounds(seconds: float, tokens: tuple[int | None, ...]) -> None:
    content = sound_bytes(seconds)
    for family, count in zip(HEARS, tokens, strict=True):
        if count is not None:
            assert look(medium(content, "audio"), limits(family)).num_tokens == count


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_odd_rates_and_channels_become_one_channel_of_the_model_s_rate(rate: int, format: str) -> None:
    seen = look(medium(sound_bytes(0.7, rate, 2, format), "audio"), limits("qwen3_omni_moe"))
    hearing = FAMILIES["qwen3_omni_moe"].hearing
    assert hearing is not None
    with open(seen.path, "rb") as file:
        wave = waveform(file, hearing)
    assert abs(len(wave) - 0.7 * 16000) < 16000 * 0.06
    peak = np.abs(np.fft.rfft(wave))[5:].argmax() + 5
    assert peak * 16000 / len(wave) == pytest.approx(440, abs=3)
    assert load(seen, limits("qwen3_omni_moe")).shape == (128, seen.grid[0])


def test_a_clip_beyond_the_recipe_s_bound_is_a_wrong_row() -> None:
    with pytest.raises(RowError, match=r"longer than data\.media\.max_seconds, 1"):
        look(medium(sound_bytes(1.5), "audio"), limits("qwen2_audio", max_seconds=1))


# --------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(
    ("family", "indices"),
    [("qwen2_5_vl", (0, 5, 10, 15)), ("qwen3_vl", (0, 6, 13, 19)), ("qwen2_vl", (0, 5, 10, 15))],
)
def test_frames_are_taken_by_the_rule_of_the_family(tmp_path: Path, family: str, indices: tuple[int, ...]) -> None:
    file = write_video(tmp_path / "a.mp4", 20, 10)
    bound = limits(family)
    seen = look(medium(file, "video"), bound)
    assert (seen.frames, seen.original, seen.grid[0]) == (indices, (64, 48), 2)
    assert seen.seconds_per_step == 1.0
    assert seen.times == tuple((indices[k] + indices[k + 1]) / 20 for k in (0, 2))
    shown = colours(seen, bound)
    expected = [255 * k // 19 for k in indices]
    np.testing.assert_allclose(shown.mean(axis=(1, 2, 3)), expected, atol=3)
    vision = FAMILIES[family].vision
    assert vision is not None
    assert load(seen, bound).shape == (int(np.prod(seen.grid)), 6 * vision.patch**2)


@given(st.integers(1, 3000), st.floats(1, 120), st.sampled_from(["qwen2_vl", "qwen3_vl"]), st.integers(2, 768))
def test_frames_are_in_order_whole_and_within_bounds(total: int, fps: float, family: str, most: int) -> None:
    vision = FAMILIES[family].vision
    assert vision is not None
    taken = frames_taken(Film(64, 48, total, fps), 2.0, replace(vision, max_frames=most))
    assert list(taken) == sorted(taken)
    assert taken[0] >= 0
    assert taken[-1] < total
    assert len(taken) <= max(most, 1)
    assert family == "qwen3_vl" or total < 2 or len(taken) % 2 == 0


def test_frames_that_a_row_lists_are_the_video(rows: Path) -> None:
    for name in ("0.png", "1.png", "2.png"):
        (rows / name).write_bytes(picture_bytes(picture(64, 64, seed=int(name[0]))))
    files = tuple(rows / f"{k}.png" for k in range(3))
    seen = look(medium(files, "video", fps=1.0), limits())
    assert (seen.frames, seen.grid[0], seen.times) == ((0, 1, 2), 2, (0.5, 2.0))
    shown = colours(seen, limits())
    assert shown.shape[0] == 3
    patches = load(seen, limits()).reshape(2, -1, 3, 2, 14 * 14)
    np.testing.assert_array_equal(patches[1, :, :, 0], patches[1, :, :, 1])  # the last frame twice
    with pytest.raises(RowError, match="different sizes: 64×64, 40×30"):
        look(medium((*files, rows / "a.png"), "video"), limits())
    (rows / "1.png").write_bytes(PICTURE)
    with pytest.raises(RowError, match="has changed"):
        load(seen, limits())


def test_a_video_that_breaks_off_is_said(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", 40, 10).read_bytes()
    for share in (0.3, 0.9):
        with pytest.raises(RowError):
            look(medium(whole[: int(len(whole) * share)], "video"), limits())


# --------------------------------------------------------------------------------------------------------- mutants


@pytest.mark.fault("N95 N96", "hundreds of damaged files: each is refused in words, or can be trained as it was seen")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("num", [40, pytest.param(500, marks=pytest.mark.soak)])
def test_mutated_media_are_seen_or_refused_but_never_a_traceback(tmp_path: Path, num: int) -> None:
    random = Random(int(os.environ.get("FUZZ_SEED", 0)))
    film = write_video(tmp_path / "a.mp4", 8, 4).read_bytes()
    whole: list[tuple[MediaKind, bytes, str]] = [
        *(("image", content, "qwen2_5_vl") for content in (PICTURE, JPEG, WEBP, animated("GIF"))),
        *(("image", saved(picture(30, 30), format), "qwen3_vl") for format in ("BMP", "TIFF", "PPM", "AVIF")),
        *(("audio", wav(format=format), "qwen3_omni_moe") for format in ("WAV", "FLAC", "OGG", "MP3")),
        ("video", film, "qwen3_vl"),
    ]
    fates = {True: 0, False: 0}
    for _ in range(num):
        kind, content, family = random.choice(whole)
        mutated = bytearray(content)
        for _ in range(random.choice([1, 4, 40])):
            mutated[random.randrange(min(len(mutated), random.choice([64, 10**9])))] = random.randrange(256)
        if random.random() < 0.3:
            del mutated[random.randrange(len(mutated)) :]
        bound = limits(family, max_pixels=100_000, max_seconds=60)
        try:
            seen = look(medium(bytes(mutated), kind), bound)
        except RowError:
            fates[False] += 1
        else:
            loaded = load(seen, bound)  # what was seen can be trained
            assert loaded.dtype == np.float32
            assert np.isfinite(loaded).all()
            assert kind == "audio" or len(loaded) == np.prod(seen.grid)
            fates[True] += 1
    assert min(fates.values()) > 0
