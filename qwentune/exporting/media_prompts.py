"""A picture and a sound of our own, in the prompts in which a server shows them: an export is verified on them too."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qwentune.data.layout.media_batch import as_prompt
from qwentune.data.layout.media_table import RunMedia
from qwentune.data.sample import MediaKind, Medium, Message, RowError
from qwentune.exporting.finished import FinishedRun
from qwentune.exporting.package import main_mode

SIDE, RATE = 96, 16_000  # pixels; samples of one second


def media_prompts(run: FinishedRun, base: Path, model_type: str) -> dict[str, dict[str, Tensor]]:
    """By its name a prompt for each kind of medium that the model takes, but for videos: keywords of a forward.

    None where the run has no template or one that does not show it, or libraries that read such files are not there.
    """
    renderer = run.renderer(base, model_type)
    if renderer.limits is None or run.template is None:
        return {}
    mode: Any = main_mode(run.report)
    rng = np.random.default_rng(0)
    prompts: dict[str, dict[str, Tensor]] = {}
    kinds: dict[MediaKind, str] = {"image": "a picture", "audio": "a sound"}
    for kind, name in kinds.items():
        if kind not in renderer.limits.family.pads:
            continue
        try:
            content = _picture(rng) if kind == "image" else _sound(rng)
            question = Message("user", "What is it?", media=(Medium(kind, content, 0, name),))
            ids, seen = renderer.prompt([question], mode)
        except (ImportError, RowError):
            continue
        prompts[name] = as_prompt(ids, RunMedia.of(seen, renderer.limits, run.tokenizer.control_ids))
    return prompts


def _picture(rng: np.random.Generator) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def _sound(rng: np.random.Generator) -> bytes:
    import soundfile

    file = BytesIO()
    soundfile.write(file, rng.normal(0, 0.1, RATE), RATE, format="WAV")
    return file.getvalue()
