"""Bytes that towers take of a forward pass's pictures and sounds: what comes in, what goes out, what is kept.

Source: traces on meta tensors of the towers of transformers 5.24, fitted in bf16 and fp32 over widths, depths, heads
and feed-forward sizes; what they keep is met to the byte per patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.media import CLIP_FRAMES, CLIPS_AT_ONCE
from qwentune.facts.tower_spec import AudioTower, VisionTower
from qwentune.memory.settings import Settings

_FP32 = 4
_INDEX = 8


@dataclass(frozen=True, slots=True)
class MediaBytes:
    """Bytes of the media of a forward pass by the time that they live.

    `inputs` are there throughout; `running` on top while a tower's forward pass runs, and `outputs` until that of the
    decoder is through. `kept` waits for the backward pass, in which a tower holds `backward` on top.
    """

    inputs: int = 0
    running: int = 0
    outputs: int = 0
    kept: int = 0
    backward: int = 0

    def __add__(self, other: MediaBytes) -> MediaBytes:
        """Of two towers, of which one runs after the other."""
        return MediaBytes(
            self.inputs + other.inputs,
            max(self.running, other.running + self.outputs),
            self.outputs + other.outputs,
            self.kept + other.kept,
            max(self.backward, other.backward),
        )


def media_bytes(spec: ModelSpec, settings: Settings) -> MediaBytes:
    """The media of a forward pass at its fullest, on one rank; all 0 where nothing sees or hears."""
    found = MediaBytes()
    if spec.tower is not None and settings.towers is not None:
        if spec.tower.vision is not None and settings.forward_patches:
            found += _of_pictures(spec.tower.vision, settings)
        if spec.tower.audio is not None and settings.forward_frames:
            found += _of_sounds(spec.tower.audio, settings)
    return found


def without_gradients(settings: Settings) -> Settings:
    """The settings as an evaluation has them for towers, of which nothing is kept."""
    if settings.towers is None:
        return settings
    return replace(settings, towers=replace(settings.towers, body="frozen", merger="frozen"))


def _of_pictures(vision: VisionTower, settings: Settings) -> MediaBytes:
    patches, width, hidden = settings.forward_patches, settings.weight_bytes, vision.hidden_size
    assert settings.towers is not None
    inner, per_token = vision.intermediate_size, vision.merge**2
    output = width * vision.out_size // per_token  # of one merger, per patch
    num_outputs = 1 + len(vision.deepstack)
    angles = 2 * _FP32 * hidden // vision.num_heads
    cast = width * vision.patch_values if width != _FP32 else 0

    inputs = _FP32 * vision.patch_values + 2 * _INDEX
    inputs += _INDEX // per_token if vision.window else 0
    inputs += 4 * (_INDEX + _FP32) if vision.num_positions else 0  # four places of the table, and their weights
    attention = (34 if width == 2 else 40) * hidden
    feed_forward = width * (3 * hidden + (2 if vision.kind == "qwen3_vl" else 3) * inner)
    running = max(attention, feed_forward) + angles + cast
    if vision.kind == "qwen3_vl":
        running += 4 * hidden + len(vision.deepstack) * output
    kept = backward = 0
    if settings.tunes_towers:
        saved, widest = _block_of_pictures(vision, width)
        kept = cast + angles + vision.depth * (width * hidden if settings.recomputes_towers else saved)
        running = kept + (running - cast - angles if settings.recomputes_towers else 0)
        backward = saved + widest if settings.recomputes_towers else 5 * width * hidden
        backward += num_outputs * output
    if settings.towers.is_tuned:
        merger = 4 * width * hidden + output
        if vision.is_gated and settings.tunes_towers:
            merger += _FP32 * hidden if width == 2 else width * hidden
        deep = (3 if settings.tunes_towers else 4) * width * hidden + output
        kept += merger + len(vision.deepstack) * deep
    outputs = width * hidden + (0 if settings.towers.is_tuned else num_outputs * output)
    return MediaBytes(*(patches * each for each in (inputs, running, outputs, kept, backward)))


def _block_of_pictures(vision: VisionTower, width: int) -> tuple[int, int]:
    """Per patch: what one block saves, and what its backward pass holds on top."""
    hidden, inner = vision.hidden_size, vision.intermediate_size
    norms = (2 if vision.is_gated else 4) * _FP32
    log_sums = _FP32 * vision.num_heads
    if vision.kind == "qwen2_vl":
        return 11 * width * hidden + 3 * width * inner + log_sums + norms, 2 * width * inner
    if vision.kind == "qwen2_5_vl":
        per_hidden = 30 if width == 2 else 52
        return per_hidden * hidden + 4 * width * inner + log_sums + norms, 2 * width * inner
    return 11 * width * hidden + 2 * width * inner + log_sums + norms, width * inner


def _of_sounds(audio: AudioTower, settings: Settings) -> MediaBytes:
    """Sounds take little beside pictures; what runs and what a block's backward pass holds errs upwards."""
    frames, width, hidden = settings.forward_frames, settings.weight_bytes, audio.hidden_size
    assert settings.towers is not None
    inner, channels, is_whole = audio.intermediate_size, audio.downsample, audio.kind == "qwen2_audio"
    positions = 13 / 100 if channels else 1 / 2  # per frame
    at_once, pads = frames, frames * (positions if channels else positions / 2)
    if is_whole:  # clips that are padded to one length: some at once, and no more pads of them than the row has
        at_once, pads = min(frames, CLIPS_AT_ONCE * CLIP_FRAMES), min(pads, settings.forward_tokens)
    output = pads * width * audio.out_size
    cast = width * audio.mel_bins if width != _FP32 else 0
    if channels:  # each convolution halves both axes; its output, and that of the activation after it
        first = channels * audio.mel_bins / 4
        convolving, convolved = width * 2 * first, width * 2 * (1 + 1 / 4 + 1 / 16) * first
    else:
        convolving, convolved = 4.5 * width * hidden, 3 * width * hidden
    # Whole ones as they came, others cut into chunks.
    inputs = frames * (_FP32 * audio.mel_bins + 2 * _INDEX * positions)
    through = max(convolving, positions * width * (4.5 * hidden + 2 * inner))
    running = at_once * (cast + through)
    saved = positions * (9 * width * hidden + 2 * width * inner + _FP32 * (audio.num_heads + 4))
    kept = backward = 0.0
    if settings.tunes_towers:
        blocks = audio.depth * (positions * width * hidden if settings.recomputes_towers else saved)
        kept = frames * (cast + convolved + positions * width * hidden + blocks)
        running = kept + (at_once * through if settings.recomputes_towers else 0)
        widest = max(positions * width * (2 * hidden + inner), 0.3 * convolving if channels else 0)
        backward = output + at_once * (saved + widest if settings.recomputes_towers else widest)
    if settings.towers.is_tuned:
        kept += output + pads * width * hidden * (2 if channels else 1)
    outputs = 0 if settings.towers.is_tuned else output
    return MediaBytes(*(round(each) for each in (inputs, running, outputs, kept, backward)))
