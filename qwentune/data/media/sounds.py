"""Sounds: one channel at the model's rate, and the mel features of Whisper's extractor.

Channels are averaged and rates converted as librosa does, which servers use (soxr, HQ).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qwentune.data.media.pictures import needed
from qwentune.data.sample import RowError
from qwentune.facts.media import Hearing

LEAST_SECONDS = 0.1  # shorter clips have no pad, or one, of which models take another path
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
BLOCK_SAMPLES = 2**20


def clip(file: BinaryIO, most_seconds: float) -> tuple[int, int]:
    """Samples and rate of a file, of which each sample was decoded; RowError where it is no whole clip.

    Only the header is read of one that is longer than `most_seconds`.
    """
    total = 0
    with _Sound(file) as sound:
        rate = sound.samplerate
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise RowError(f"it has {rate:,} samples a second", "Save it with 16,000: sox FILE -r 16000 new.wav")
        if sound.frames / rate > most_seconds:
            return sound.frames, rate
        for block in _blocks(sound):
            total += len(block)
            if not np.isfinite(block).all():
                raise RowError("it holds samples that are no finite numbers", "Save it again as 16-bit WAV.")
    if total < min(sound.frames, 2**62):
        what = f"it breaks off: {total:,} of {sound.frames:,} samples are there"
        raise RowError(what, "Download or save it again.")
    return total, rate


def num_samples(samples: int, rate: int, hearing: Hearing) -> int:
    """How many samples a clip has at the model's rate."""
    return math.ceil(samples * (hearing.sampling_rate / rate))


def mel_frames(samples: int, hearing: Hearing) -> int:
    """Mel frames of so many samples at the model's rate: whole ones, or begun ones where clips are padded."""
    return samples // hearing.hop if hearing.most_seconds is None else -(-samples // hearing.hop)


def num_pads(frames: int, hearing: Hearing) -> int:
    """Pads that stand for so many mel frames."""
    if hearing.count == "halved_twice":
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1
    begun = (frames % 100 - 1) // 2 + 1
    return ((begun - 1) // 2 + 1 - 1) // 2 + 1 + 13 * (frames // 100)


@lru_cache
def most_frames_per_pad(hearing: Hearing) -> float:
    """The most mel frames that the tower takes for one pad, over clips of every length that is let in.

    Short clips have the most: of each a whole one is taken where clips are padded, and counts of pads round down.
    """
    whole = mel_frames(round((hearing.most_seconds or 0) * hearing.sampling_rate), hearing)
    shortest = mel_frames(round(LEAST_SECONDS * hearing.sampling_rate), hearing)
    return max(max(frames, whole) / num_pads(frames, hearing) for frames in range(shortest, shortest + 100))


def waveform(file: BinaryIO, hearing: Hearing) -> NDArray[np.float32]:
    """(samples,) of a file, one channel at the model's rate."""
    with _Sound(file) as sound:
        wave, rate = np.concatenate([block.mean(axis=1) for block in _blocks(sound)]), sound.samplerate
    if rate == hearing.sampling_rate:
        return wave
    length = num_samples(len(wave), rate, hearing)
    wave = needed("soxr", "audio", "sounds").resample(wave, rate, hearing.sampling_rate, quality="HQ")[:length]
    return np.pad(wave, (0, length - len(wave)))


def _blocks(sound: Any) -> Iterator[NDArray[np.float32]]:
    """(samples, channels) as they are decoded; soundfile's own `blocks` fills up what a broken file does not give."""
    while len(block := sound.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        yield block


def features(wave: NDArray[np.float32], hearing: Hearing) -> NDArray[np.float32]:
    """(mel_bins, L) of a clip alone; of models that take clips of one length, padded to it."""
    extract = _extractor(hearing)
    whole = {"padding": "max_length"} if hearing.most_seconds is not None else {"padding": True, "truncation": False}
    return extract(wave, sampling_rate=hearing.sampling_rate, return_tensors="np", **whole)["input_features"][0]


@lru_cache(maxsize=2)
def _extractor(hearing: Hearing) -> Any:
    from transformers import WhisperFeatureExtractor

    seconds = 30 if hearing.most_seconds is None else int(hearing.most_seconds)
    return WhisperFeatureExtractor(hearing.mel_bins, hearing.sampling_rate, hearing.hop, chunk_length=seconds)


class _Sound:
    """A file of sound, opened; whatever libsndfile raises of it is a RowError."""

    def __init__(self, file: BinaryIO) -> None:
        self._read = file

    def __enter__(self) -> Any:
        soundfile = needed("soundfile", "audio", "sounds")
        needed("soxr", "audio", "sounds")
        try:
            self._file = soundfile.SoundFile(self._read)
        except Exception as error:  # a decoder may raise anything of broken bytes
            raise _broken(error) from None
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        if isinstance(error, Exception) and not isinstance(error, RowError):
            raise _broken(error) from None


def _broken(error: Exception) -> RowError:
    fix = "Save it again as WAV, FLAC, OGG or MP3 (ffmpeg -i FILE new.wav), or leave the row out."
    reason = str(error).rpartition(": ")[2].strip().rstrip(".")
    return RowError(f"it is no sound that can be read: {reason}", fix)
