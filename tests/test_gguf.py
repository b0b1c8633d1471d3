"""GGUF files are read by others as what was tuned: gguf's reader, transformers' own, and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from qwentune.errors import UsageError, UserError
from qwentune.exporting.gguf_file import verify_gguf, write_gguf
from qwentune.exporting.gguf_tensors import ARCHITECTURES, GgufTensor
from qwentune.exporting.tensors import ModelTensor
from qwentune.facts.models import model_spec
from qwentune.facts.weight_files import read_weights
from tests.families import write_family

TEXT = "Hello! 1 + 1 = two, don't you think?\n\ndef f(x):\n    return 你好"


def written(folder: Path, kind: str, **changed: Any) -> tuple[Path, list[GgufTensor], Tokenizer]:
    """The GGUF file of a checkpoint folder, its tensors, and the tokenizer."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text()) | changed
    tokenizer = load_tokenizer(folder)
    path = folder / f"tiny-{kind}.gguf"
    tensors = write_gguf(
        path,
        kind,
        {name: ModelTensor(tensor) for name, tensor in read_weights(folder).items()},
        spec=model_spec(str(folder)),
        config=config,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        stops=[tokenizer.control_ids["<|im_end|>"]],
    )
    return path, tensors, tokenizer


def logits(folder: Path, ids: list[int], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        return model(torch.tensor([ids])).logits[0]


def test_a_file_holds_tokenizer_template_stop_tokens_and_rope(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "qwen3_5_moe_text")
    path, _, tokenizer = written(folder, "q8_0")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    end = tokenizer.control_ids["<|im_end|>"]
    assert (fields["general.architecture"], fields["tokenizer.ggml.pre"]) == ("qwen35moe", "qwen35")
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (end, end)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (tokens[end], kinds[end]) == ("<|im_end|>", gguf.TokenType.CONTROL)
    assert kinds[tokens.index("<think>")] == gguf.TokenType.USER_DEFINED
    assert len(tokens) == model_spec(str(folder)).vocab_rows
    assert fields["qwen35moe.rope.freq_base"] == 5e6
    assert fields["qwen35moe.rope.dimension_sections"] == [3, 3, 2, 0]
    assert fields["qwen35moe.rope.dimension_count"] == 16
    experts = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up_exps.weight")
    assert [int(size) for size in experts.shape] == [64, 64, 4]


def test_transformers_reads_a_file_as_the_same_model(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "qwen2", dtype="bfloat16")
    path, _, tokenizer = written(folder, "f32")
    (ids,) = tokenizer.encode([TEXT])
    torch.testing.assert_close(logits(folder, ids, gguf_file=path.name), logits(folder, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "error"), [("f32", 0.0), ("bf16", 0.0), ("f16", 2**-11), ("q8_0", 1 / 254 + 2**-11)])
def test_a_file_is_verified_by_reading_it_again(tmp_path: Path, kind: str, error: float) -> None:
    folder = write_family(tmp_path, "qwen3", dtype="bfloat16")
    path, tensors, _ = written(folder, kind)
    assert verify_gguf(path, tensors) <= error * 1.01
    found = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[int(found.data_offset) + 16 : int(found.data_offset) + 48] = b"\x7b" * 32
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight is off by"):
        verify_gguf(path, tensors)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "qwen3_moe")
    with pytest.raises(UsageError, match=r"norm_topk_prob is False; llama\.cpp computes qwen3_moe as if it were True"):
        written(folder, "f32", norm_topk_prob=False)


@pytest.mark.soak
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_computes_what_was_tuned(tmp_path: Path, model_type: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is built in ten minutes")
    folder = write_family(tmp_path, model_type)
    path, _, tokenizer = written(folder, "f32")
    (ids,) = tokenizer.encode([TEXT])
    options = {"type_k": 0, "type_v": 0, "flash_attn": False}  # a cache in fp32
    model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, **options)
    assert model.tokenize(TEXT.encode(), add_bos=False, special=False) == ids
    assert model.token_eos() == tokenizer.control_ids["<|im_end|>"]
    model.eval(ids)
    theirs = torch.from_numpy(np.array(model.scores[: len(ids)]))
    model.close()
    torch.testing.assert_close(theirs, logits(folder, ids), atol=1e-3, rtol=0)
