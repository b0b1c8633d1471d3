"""Processes that have torchvision, without which transformers constructs no processor of videos.

TORCHVISION names a folder into which it was unpacked (`pip download torchvision --no-deps`); installed beside a torch
for CPUs it breaks transformers, for want of two operators, which are therefore declared at the start of each process,
and it decodes no pictures, which Pillow does.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.runs import ENVIRONMENT

needs_torchvision = pytest.mark.skipif(
    "TORCHVISION" not in os.environ, reason="TORCHVISION names no folder with torchvision in it"
)
AT_THE_START = """
from io import BytesIO

import numpy, torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision.io
from PIL import Image


def decode_image(content, mode=None, apply_exif_orientation=False):
    picture = Image.open(BytesIO(content.numpy().tobytes())).convert("RGB")
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)


torchvision.io.decode_image = torchvision.io.image.decode_image = decode_image
"""


def environment(folder: Path) -> dict[str, str]:
    """The environment of such a process; `folder` is written into."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(AT_THE_START)  # which Python runs by itself
    return {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(folder), os.environ["TORCHVISION"]])}
