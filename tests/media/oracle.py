"""What a server would have of a dialogue with media, from first principles and free of qwentune.

The template is rendered turn by turn (tests/oracle.py); each pad that it writes becomes as many as its medium has
tokens. Sizes, counts and positions are the published processors'; where transformers and vLLM differ, vLLM's:

- text after a video goes on after the largest position of the video, on any axis;
- a video of Qwen3-VL and 3.5 becomes, for each step, `<0.1 seconds>`, a start mark, its pads and an end mark in place
  of the template's marks and pad, each text encoded by itself.

Videos of the Omni models are left out: what a server makes of them hangs on its flags.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from tests import dialogues, oracle
from tests.media.checkpoints import MediaType
from tests.media.material import Item, Kind, Material

Row: TypeAlias = dict[str, Any]
Grid: TypeAlias = tuple[int, int, int]

UNTRAINED = oracle.UNTRAINED
MERGE, TEMPORAL = 2, 2
FRAMES_PER_SECOND, FEWEST_FRAMES, MOST_FRAMES = 2.0, 4, 768
HOP = 160


@dataclass(frozen=True)
class Rules:
    """What a family makes of media; numbers as its published folder has them."""

    pads: Mapping[Kind, str]
    patch: int = 14
    min_pixels: int = 3136
    max_pixels: int = 12845056
    # A video: of each frame, or of all together where it is written step by step.
    min_video_pixels: int = 3136
    max_video_pixels: int = 12845056
    steps_apart: bool = False
    position_of_second: float = 0.0  # 0: a step of a video is one position
    axes: Literal[1, 3] = 3
    count: Literal["", "halved_twice", "by_hundred"] = ""
    in_system: bool = False  # media in the system text reach the prompt
    in_tools: bool = False  # tools, calls and answers are rendered, with the media in answers
    thinks: bool = False

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that dialogues are made of."""
        return tuple(kind for kind in self.pads if not (kind == "video" and self.count))


_VL: dict[Kind, str] = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
_VL3 = Rules(
    _VL,
    patch=16,
    min_pixels=65536,
    max_pixels=16777216,
    min_video_pixels=4096,
    max_video_pixels=25165824,
    steps_apart=True,
    in_tools=True,
)
_HYBRID = replace(_VL3, thinks=True)
_OMNI: dict[Kind, str] = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>"}

RULES: dict[MediaType, Rules] = {
    "qwen2_vl": Rules(_VL, in_system=True),
    "qwen2_5_vl": Rules(_VL, position_of_second=2, in_system=True),
    "qwen3_vl": _VL3,
    "qwen3_vl_moe": _VL3,
    "qwen3_5": _HYBRID,
    "qwen3_5_moe": _HYBRID,
    "qwen2_audio": Rules({"audio": "<|AUDIO|>"}, axes=1, count="halved_twice"),
    "qwen2_5_omni_thinker": Rules(_OMNI, position_of_second=25, count="halved_twice", in_system=True),
    "qwen3_omni_moe_thinker": Rules(
        {**_VL, "audio": "<|audio_pad|>"}, patch=16, position_of_second=13, count="by_hundred", in_system=True
    ),
}


@dataclass(frozen=True)
class Class:
    """A folder of one of the classes, and its tokenizer as transformers reads it."""

    name: MediaType
    folder: Path
    tokenizer: PreTrainedTokenizerFast


# --- one medium


@dataclass(frozen=True)
class Shown:
    """A medium in a prompt: its grid, its pads in all, and of a video which frames are taken and when its steps are."""

    item: Item
    grid: Grid
    num_tokens: int
    frames: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    seconds_per_step: float = 0.0


def shown(item: Item, rules: Rules) -> Shown:
    """A medium as the family sees it."""
    if item.kind == "audio":
        frames = item.num_samples // HOP
        return Shown(item, (frames, 0, 0), num_audio_tokens(frames, rules))
    factor = rules.patch * MERGE
    if item.kind == "image":
        height, width = resized(item.height, item.width, factor, rules.min_pixels, rules.max_pixels)
        grid = 1, height // rules.patch, width // rules.patch
        return Shown(item, grid, math.prod(grid) // MERGE**2)
    frames = frames_taken(item, rules)
    if rules.steps_apart:
        height, width = resized_together(len(frames), item.height, item.width, factor, rules)
    else:
        height, width = resized(item.height, item.width, factor, rules.min_video_pixels, rules.max_video_pixels)
    even = (*frames, *frames[-1:] * (len(frames) % TEMPORAL))
    steps = [even[i : i + TEMPORAL] for i in range(0, len(even), TEMPORAL)]
    grid = len(steps), height // rules.patch, width // rules.patch
    times = tuple(sum(frame / item.fps for frame in step) / TEMPORAL for step in steps)
    rate = len(frames) / item.num_frames * item.fps
    return Shown(item, grid, math.prod(grid) // MERGE**2, frames, times, TEMPORAL / rate)


def resized(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width of a picture after it is resized: multiples of `factor` within the limits."""
    new = round(height / factor) * factor, round(width / factor) * factor
    return _bounded(new, (height, width), factor, new[0] * new[1], height * width, min_pixels, max_pixels)


def resized_together(num_frames: int, height: int, width: int, factor: int, rules: Rules) -> tuple[int, int]:
    """Height and width of each frame where the limits hold for all frames together."""
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    new = round(height / factor) * factor, round(width / factor) * factor
    whole = round(num_frames / TEMPORAL) * TEMPORAL * new[0] * new[1]
    limits = rules.min_video_pixels, rules.max_video_pixels
    return _bounded(new, (height, width), factor, whole, num_frames * height * width, *limits)


def _bounded(
    new: tuple[int, int], old: tuple[int, int], factor: int, rounded: int, exact: int, least: int, most: int
) -> tuple[int, int]:
    """The new size, or one of the old shape that has at most `most` or at least `least` pixels."""
    if rounded > most:
        ratio = math.sqrt(exact / most)
        height, width = (max(factor, math.floor(side / ratio / factor) * factor) for side in old)
        return height, width
    if rounded < least:
        ratio = math.sqrt(least / exact)
        height, width = (math.ceil(side * ratio / factor) * factor for side in old)
        return height, width
    return new


def frames_taken(item: Item, rules: Rules) -> tuple[int, ...]:
    """The frames of a video that are shown, 2 of a second, evenly from the first to the last.

    Qwen2-VL and 2.5-VL take an even number, as Qwen's own code does; Qwen3-VL and 3.5 any, as their processor does.
    """
    wanted = item.num_frames / item.fps * FRAMES_PER_SECOND
    count = min(max(int(wanted), FEWEST_FRAMES), MOST_FRAMES, item.num_frames)
    if not rules.steps_apart:
        count = count // TEMPORAL * TEMPORAL
    return tuple(np.linspace(0, item.num_frames - 1, count).round().astype(int).tolist())


def num_audio_tokens(frames: int, rules: Rules) -> int:
    """How many pads stand for so many mel frames."""
    if rules.count == "halved_twice":
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1
    left = (frames % 100 - 1) // 2 + 1
    return ((left - 1) // 2 + 1 - 1) // 2 + 1 + 13 * (frames // 100)


# --- a dialogue


@dataclass
class Example:
    """One training example as a server would have it; `media` in the order of their pads."""

    turns: list[int]
    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    media: list[tuple[Shown, int]] = field(default_factory=list[tuple[Shown, int]])  # with the place of its first pad
    positions: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 0), np.int64))


def expected_examples(
    row: Row,
    tokenizer: PreTrainedTokenizerFast,
    model_type: MediaType,
    items: Mapping[str, Item],
    rules: Rules | None = None,
) -> list[Example]:
    """The examples of a row of the `chat` format whose media are named in `items`; under other `rules` if given.

    `weights` are of each token, 0 without loss; `positions` are (3, T), all alike where positions have one axis.
    """
    rules = rules or RULES[model_type]
    form = oracle.reasoning_form(tokenizer, {})
    messages, reasons = zip(*(_normalised(message, form) for message in row["messages"]), strict=True)
    media = [_media_of(message, items, rules) for message in row["messages"]]
    weights = [oracle.turn_weight(message) for message in row["messages"]]
    trained = [i for i in range(len(messages)) if weights[i] > 0 and oracle.has_user_turn(list(messages[:i]))]

    examples: list[Example] = []
    for i in trained:
        args = {"enable_thinking": reasons[i]}
        tools = row.get("tools") or None
        context, target = oracle.context_and_target(list(messages[: i + 1]), tools, tokenizer, args)
        assert not set(target) & {_pad_id(tokenizer, rules, kind) for kind in rules.pads}
        seen = list(itertools.chain.from_iterable(media[: i + 1]))
        context, places = expanded(context, seen, tokenizer, rules)
        last = examples[-1] if examples else None
        if last is None or context[: len(last.input_ids)] != last.input_ids:
            last = Example([], [], [], [])
            examples.append(last)
        between = context[len(last.input_ids) :]
        last.turns.append(i)
        last.input_ids += between + target
        last.labels += [UNTRAINED] * len(between) + target
        last.weights += [0.0] * len(between) + [weights[i]] * len(target)
        last.media = list(zip(seen, places, strict=True))
    for example in examples:
        example.positions = positions(example, tokenizer, rules)
    return examples


def _normalised(message: Row, form: oracle.ReasoningForm | None) -> tuple[Row, bool]:
    """The message as the template gets it: parts where there are media, else a text; and whether it has reasoning."""
    content = message.get("content")
    if not isinstance(content, list) or all(part["type"] == "text" for part in content):
        return oracle.normalised(message, form, "refuse")
    plain, reasons = oracle.normalised({**message, "content": ""}, form, "refuse")
    return plain | {"content": content}, reasons


def _media_of(message: Row, items: Mapping[str, Item], rules: Rules) -> list[Shown]:
    """The media of a message in order."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return [shown(items[part[part["type"]]], rules) for part in parts if part["type"] != "text"]


def _pad_id(tokenizer: PreTrainedTokenizerFast, rules: Rules, kind: Kind) -> int:
    return tokenizer.get_added_vocab()[rules.pads[kind]]


def expanded(
    ids: Sequence[int], media: Sequence[Shown], tokenizer: PreTrainedTokenizerFast, rules: Rules
) -> tuple[list[int], list[int]]:
    """The ids with as many pads as the media have tokens, and where the first pad of each stands.

    `ids` have one pad for each medium; that they are all and of the right kinds is asserted.
    """
    kinds = {_pad_id(tokenizer, rules, kind): kind for kind in rules.pads}
    assert [kinds[token] for token in ids if token in kinds] == [medium.item.kind for medium in media]
    left, out, places, skip = iter(media), list[int](), list[int](), False
    for before, token, after in zip([0, *ids], ids, [*ids[1:], 0], strict=False):
        if skip:  # the end mark of a video that was written step by step
            skip = False
            continue
        if token not in kinds:
            out.append(token)
            continue
        medium = next(left)
        if medium.item.kind != "video" or not rules.steps_apart:
            places.append(len(out))
            out += [token] * medium.num_tokens
            continue
        assert out.pop() == before
        for number, seconds in enumerate(medium.times):
            out += [*tokenizer.encode(f"<{seconds:.1f} seconds>", add_special_tokens=False), before]
            if number == 0:
                places.append(len(out))
            out += [token] * (medium.num_tokens // medium.grid[0]) + [after]
        skip = True
    return out, places


def positions(example: Example, tokenizer: PreTrainedTokenizerFast, rules: Rules) -> NDArray[np.int64]:
    """(3, T): time, row and column of each token."""
    ids, out, at, place = example.input_ids, np.zeros((3, len(example.input_ids)), np.int64), 0, 0
    vision = {_pad_id(tokenizer, rules, kind) for kind in rules.pads if kind != "audio"}
    blocks = iter(_blocks(example, rules))
    while at < len(ids):
        if ids[at] not in vision:
            out[:, at] = place
            at, place = at + 1, place + 1
            continue
        block = next(blocks) + place
        out[:, at : at + block.shape[1]] = block
        at, place = at + block.shape[1], int(block.max()) + 1
    return out


def _blocks(example: Example, rules: Rules) -> Iterator[NDArray[np.int64]]:
    """The positions of each run of pads that have three axes, from 0: (3, pads)."""
    for medium, _ in example.media:
        if medium.item.kind == "audio":
            continue
        steps, rows, columns = medium.grid[0], medium.grid[1] // MERGE, medium.grid[2] // MERGE
        runs = [steps]
        if medium.item.kind == "video" and rules.steps_apart:
            runs = [1] * steps
        for count in runs:
            clock = np.arange(count, dtype=np.float64)
            if medium.item.kind == "video" and rules.position_of_second:
                clock *= medium.seconds_per_step * rules.position_of_second
            axes = np.meshgrid(clock.astype(np.int64), np.arange(rows), np.arange(columns), indexing="ij")
            yield np.stack(axes).reshape(3, -1).astype(np.int64)


# --- dialogues


def generated(
    seed: int, model_type: MediaType, material: Material, count: int = 200, kinds: Sequence[Kind] = ()
) -> list[Row]:
    """Rows of the `chat` format, the same for the same arguments: each has a turn that is trained.

    `kinds` are the media in them; all that the class takes where none is given.

    Several turns and media in a message, media in tool answers and system texts where the template takes them, texts
    that look like pads, the same picture twice, and rows of text alone.
    """
    rng, rules = Random(f"{seed} {model_type}"), RULES[model_type]
    return [_row(rng, rules, _Shelf(material, tuple(kinds) or rules.kinds)) for _ in range(count)]


@dataclass(frozen=True)
class _Shelf:
    """What dialogues take their media from."""

    material: Material
    kinds: tuple[Kind, ...]

    def part(self, rng: Random, kind: Kind) -> Row:
        return {"type": kind, kind: rng.choice(self.material.of(kind)).name}


_TASTE = dialogues.Taste(lists=False)
_TAGS = ("see <image> here", "<video>", "<audio> and <|AUDIO|>", "a <|image_pad|> typed", "<|vision_start|>")


def _row(rng: Random, rules: Rules, shelf: _Shelf) -> Row:
    messages: list[Row] = []
    if dialogues.chance(rng, 0.3):
        content: Any = _text(rng)
        if rules.in_system and dialogues.chance(rng, 0.2):
            content = _parts(rng, shelf)
        messages.append({"role": "system", "content": content})
    tools = [dialogues.tool(rng, _TASTE, "look")] if rules.in_tools and dialogues.chance(rng, 0.4) else []
    without_media = dialogues.chance(rng, 0.1)
    for _ in range(rng.randint(1, 4)):
        asked = _text(rng) if without_media or dialogues.chance(rng, 0.3) else _parts(rng, shelf)
        messages.append({"role": "user", "content": asked})
        for _ in range(rng.randint(0, 2) if tools else 0):
            messages += _tool_round(rng, shelf, without_media)
        answer: Row = {"role": "assistant", "content": _text(rng)}
        if rules.thinks and dialogues.chance(rng, 0.5):
            answer["reasoning_content"] = _text(rng)
        messages.append(dialogues.trained_or_not(rng, answer))
    messages[-1].pop("train", None)
    messages[-1].pop("weight", None)
    return {"messages": messages} | ({"tools": tools} if tools else {})


def _tool_round(rng: Random, shelf: _Shelf, without_media: bool) -> list[Row]:
    """One or two calls and their results, in which media may stand."""
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "look", "arguments": {"at": _text(rng)}}}
        for n in range(rng.randint(1, 2))
    ]
    results: list[Row] = []
    for call in calls:
        is_text = without_media or dialogues.chance(rng, 0.5)
        content = _text(rng) if is_text else _parts(rng, shelf)
        results.append({"role": "tool", "tool_call_id": call["id"], "content": content})
    return [{"role": "assistant", "content": rng.choice(("", _text(rng))), "tool_calls": calls}, *results]


def _parts(rng: Random, shelf: _Shelf) -> list[Row]:
    """One to four parts, at least one of them a medium; texts and media in any order."""
    kinds: list[Any] = [rng.choice((*shelf.kinds, "text", "text")) for _ in range(rng.randint(0, 3))]
    kinds.insert(rng.randint(0, len(kinds)), rng.choice(shelf.kinds))
    return [{"type": "text", "text": _text(rng)} if kind == "text" else shelf.part(rng, kind) for kind in kinds]


def _text(rng: Random) -> str:
    return rng.choice(_TAGS) if dialogues.chance(rng, 0.15) else dialogues.text(rng, _TASTE)
