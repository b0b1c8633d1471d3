"""A chat shows pictures and sounds as training did: transformers, left alone with them, reads the same prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from qwentune.data.dataset import limits_of
from qwentune.data.layout.batch import collate
from qwentune.data.layout.media_batch import as_prompt
from qwentune.data.layout.media_table import RunMedia
from qwentune.data.layout.trie import lay_out
from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.sample import MediaKind, Medium, Message
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.exporting.merge import load_tuned
from qwentune.model.head import LossHead
from qwentune.model.loading import load_model
from qwentune.recipe import DataOptions
from tests.media.checkpoints import TYPES, MediaType, add_media_weights, write_media_checkpoint
from tests.media.material import Material

FAST = ("qwen2_5_vl", "qwen2_audio")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TYPES])
def test_what_a_chat_gives_the_model_is_what_training_gives_it(
    name: MediaType, files: Material, tmp_path: Path
) -> None:
    folder = add_media_weights(write_media_checkpoint(tmp_path / "model", name))
    tokenizer = load_tokenizer(folder)
    limits = limits_of(DataOptions.model_validate({"train": [{"path": "rows.jsonl"}]}), tokenizer)
    assert limits is not None
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, {})
    renderer = Renderer(tokenizer, template, RenderOptions(max_tokens=10_000), limits=limits)
    kinds: tuple[MediaKind, ...] = ("image", "audio")
    shown: list[MediaKind] = [kind for kind in kinds if kind in limits.family.pads]
    media = tuple(
        Medium(kind, files.folder / item.name, 0, f"--{kind}") for kind in shown for item in files.of(kind)[:2]
    )
    question = [Message("user", "What is it?", media=media)]
    prompt, seen = renderer.prompt(question, template.default_mode)
    assert {one.kind for one in seen} == {*shown}

    run_media = RunMedia.of(seen, limits, tokenizer.control_ids)
    target = 77
    ids = np.asarray([*prompt, target], dtype=np.int32)
    weights = (np.arange(len(ids)) == len(prompt)).astype(np.float32)
    batch = collate([lay_out([[(ids, weights)]], run_media)], 1.0, run_media)
    network = load_model(folder, dtype="fp32", has_media=True, attention="qwentune_sdpa").eval()
    trained = LossHead(network, "full").loss(network, batch)

    plain: Any = load_tuned(folder, None)
    given = as_prompt(prompt, run_media)
    with torch.no_grad():
        served = cross_entropy(plain(**given).logits[0, -1], torch.tensor(target))
        generated = plain.generate(**given, max_new_tokens=3, do_sample=False)
    assert float(served) == pytest.approx(float(trained), rel=1e-4)
    assert generated.shape[1] > len(prompt)
