"""Texts are encoded as a server does, but for control tokens, which no text becomes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qwentune.data.tokenizing import tokenizer
from qwentune.data.tokenizing.tokenizer import CONTROL_TOKEN, Tokenizer, load_tokenizer

FAMILIES = pytest.mark.parametrize("fixture", ["real_qwen3_folder", "real_qwen3_5_folder"])
shared = settings(suppress_health_check=list(HealthCheck))  # a session's tokenizer serves all examples
# Any characters, with those in which the patterns differ: white space, marks, letters, digits, half a control token.
rough = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r\t \u3000\u0301\u0e31\u093fa1<|>"))

loaded = cache(load_tokenizer)


@pytest.fixture
def ours(fixture: str, request: pytest.FixtureRequest) -> Tokenizer:
    return loaded(request.getfixturevalue(fixture))


@FAMILIES
@shared
@given(before=rough, after=rough)
def test_a_text_cut_after_a_line_feed_is_encoded_as_its_halves(ours: Tokenizer, before: str, after: str) -> None:
    """What lets each piece of a dialogue be encoded once."""
    assert ours.cuts_after_newline
    line = after.lstrip(" \t")
    assume(line and not line[0].isspace())
    whole, first, second = ours.encode([f"{before}\n{after}", f"{before}\n", after])
    assert whole == first + second


@FAMILIES
@shared
@given(text=rough)
def test_a_text_without_control_tokens_is_encoded_as_by_transformers(
    ours: Tokenizer, fixture: str, request: pytest.FixtureRequest, text: str
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    assume(not CONTROL_TOKEN.search(text))
    assert ours.encode([text]) == [reference(folder)(text)["input_ids"]]


@FAMILIES
@shared
@given(lines=st.lists(rough, min_size=2), longest=st.integers(1, 30))
def test_a_long_text_is_encoded_by_parts_as_it_is_whole(ours: Tokenizer, lines: list[str], longest: int) -> None:
    texts = ["\n".join(lines), *lines]
    whole = ours.encode(texts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenizer, "LONGEST_WHOLE", longest)
        assert ours.encode(texts) == whole


@FAMILIES
def test_no_text_becomes_a_control_token(ours: Tokenizer) -> None:
    spelled = "".join(ours.control_ids)
    (ids,) = ours.encode([spelled])
    assert not set(ids) & set(ours.control_ids.values())
    assert ours.decode(ids) == spelled
    assert {"<|im_end|>", "<|fim_middle|>", "<|file_sep|>", "<|video_pad|>"} <= ours.control_ids.keys()


@cache
def reference(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)
