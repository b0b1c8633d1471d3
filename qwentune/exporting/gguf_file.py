"""A GGUF file of a tuned text model, written tensor by tensor: what llama.cpp and all that is built on it read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from qwentune.data.tokenizing.tokenizer import PATTERNS_THAT_CUT_AFTER_NEWLINE, Tokenizer, split_pattern
from qwentune.errors import Problem, UsageError, UserError
from qwentune.exporting.gguf_tensors import GgufTensor, architecture, gguf_tensors
from qwentune.exporting.tensors import ModelTensor
from qwentune.facts.architecture import ModelSpec

KINDS = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
PRE_TOKENIZERS = dict(zip(PATTERNS_THAT_CUT_AFTER_NEWLINE, ("qwen2", "qwen35"), strict=True))
# Whether the chosen experts' weights are scaled to a sum of 1, which llama.cpp's graphs have built in.
SCALES_CHOSEN = {"qwen2_moe": False, "qwen3_moe": True, "qwen3_next": True}
SECTIONS = 4  # of rotary positions in llama.cpp
PUBLISHED_SECTIONS = [11, 11, 10]
# Of a value, or for q8_0 of the largest of its block of 32.
LARGEST_ERRORS = {Type.F32: 0.0, Type.F16: 2**-10, Type.BF16: 2**-8, Type.Q8_0: 1 / 127}


def write_gguf(
    path: Path,
    kind: str,
    tensors: Mapping[str, ModelTensor],
    *,
    spec: ModelSpec,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    chat_template: str | None,
    stops: Sequence[int],
) -> list[GgufTensor]:
    """The tensors that it has written.

    Args:
        path: The file.
        kind: What matrices are written as, a key of `KINDS`.
        tensors: Of the tuned model by name; towers are left out.
        spec: The sizes of its decoder.
        config: The decoder's section of config.json.
        tokenizer: What the model was trained with.
        chat_template: Its text, where it has one.
        stops: The ids at which an answer ends, that of a turn first.

    Raises UsageError where llama.cpp has no name for the decoder or the tokenizer, or would compute otherwise.
    """
    arch = architecture(spec.model_type)
    _refuse_other_graph(spec, config)
    written = gguf_tensors(tensors, spec, KINDS[kind])
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type("model")
    writer.add_name(path.stem)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, spec, config)
    _add_tokenizer(writer, spec, tokenizer, chat_template, stops)
    for tensor in written:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.type)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for tensor in written:
        for block in tensor.blocks():
            file.write(_encoded(block, tensor.type).tobytes())
        writer.write_padding(file, tensor.num_bytes)
    writer.close()
    return written


def verify_gguf(path: Path, written: Sequence[GgufTensor]) -> float:
    """The largest error of a value, as a share of the largest of its tensor, when the file is read again.

    Raises UserError where a tensor is missing, or another, or further off than its kind of number explains.
    """
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    problems = [Problem(str(path), f"lacks {tensor.name}") for tensor in written if tensor.name not in stored]
    largest = 0.0
    for tensor in written if not problems else ():
        found = stored[tensor.name]
        data: NDArray[Any] = found.data.reshape(-1)
        width = tensor.num_bytes // data.itemsize // (torch.Size(tensor.shape).numel() // tensor.shape[-1])
        rows, first = data.reshape(-1, width), 0
        if tuple(int(size) for size in reversed(found.shape)) != tensor.shape or found.tensor_type != tensor.type:
            problems.append(Problem(str(path), f"{tensor.name} is of another shape or kind"))
            continue
        for block in tensor.blocks():
            values = block.reshape(-1, tensor.shape[-1]).numpy()
            again = gguf.dequantize(np.array(rows[first : first + len(values)]), tensor.type).reshape(values.shape)
            first += len(values)
            error, scale = float(np.abs(values - again).max()), float(np.abs(values).max())
            largest = max(largest, error / scale if scale else error)
            if not error <= LARGEST_ERRORS[tensor.type] * scale:
                problems.append(Problem(str(path), f"{tensor.name} is off by {error:.1e}; its largest is {scale:.1e}"))
                break
    if problems:
        raise UserError(problems, "Nothing was exported; please report it.")
    return largest


def _encoded(block: torch.Tensor, kind: Type) -> NDArray[Any]:
    return gguf.quantize(block.contiguous().numpy(), kind)


def _refuse_other_graph(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Raises UsageError where llama.cpp's graph for the architecture computes something else than the model."""
    expected = SCALES_CHOSEN.get(spec.model_type)
    if expected is not None and bool(config.get("norm_topk_prob", expected)) is not expected:
        what = f"norm_topk_prob is {not expected}; llama.cpp computes {spec.model_type} as if it were {expected}"
        raise UsageError(Problem("--gguf", what, "Serve the export or the merged model with vLLM or transformers."))


def _add_sizes(writer: gguf.GGUFWriter, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(int(config.get("intermediate_size") or spec.dense_intermediate))
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(spec.vocab_rows)
    if (moe := spec.moe) is not None:
        writer.add_expert_count(moe.num_experts)
        writer.add_expert_used_count(moe.top_k)
        writer.add_expert_feed_forward_length(moe.expert_intermediate)
        if moe.shared_intermediate:
            writer.add_expert_shared_feed_forward_length(moe.shared_intermediate)
    rope: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    writer.add_rope_freq_base(spec.rope_theta)
    if (linear := spec.linear_attention) is not None:
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
        writer.add_rope_dimension_count(int(spec.head_dim * share))
        writer.add_ssm_conv_kernel(linear.conv_kernel)
        writer.add_ssm_state_size(linear.key_head_dim)
        writer.add_ssm_group_count(linear.num_key_heads)
        writer.add_ssm_time_step_rank(linear.num_value_heads)
        writer.add_ssm_inner_size(linear.value_size)
        writer.add_full_attention_interval(linear.period)
        if spec.model_type != "qwen3_next":
            sections: list[int] = list(rope.get("mrope_section") or PUBLISHED_SECTIONS)
            writer.add_rope_dimension_sections([*sections, *[0] * (SECTIONS - len(sections))])
    if rope.get("rope_type", rope.get("type")) == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        known = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
        writer.add_rope_scaling_orig_ctx_len(int(known))


def _add_tokenizer(
    writer: gguf.GGUFWriter, spec: ModelSpec, tokenizer: Tokenizer, chat_template: str | None, stops: Sequence[int]
) -> None:
    document = json.loads(tokenizer.definition)
    pre = PRE_TOKENIZERS.get(split_pattern(document) or "")
    if pre is None:
        what = "splits texts by a pattern that llama.cpp has no name for"
        raise UsageError(Problem(str(Path(tokenizer.folder, "tokenizer.json")), what))
    tokens = [f"[PAD{number}]" for number in range(spec.vocab_rows)]
    kinds = [gguf.TokenType.UNUSED] * spec.vocab_rows
    for token, number in document["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    special = {*tokenizer.control_ids.values()}
    for token in document["added_tokens"]:
        number = token["id"]
        kinds[number] = gguf.TokenType.CONTROL if number in special else gguf.TokenType.USER_DEFINED
        tokens[number] = token["content"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(stops[0] if stops else tokenizer.end_of_text_id)
    writer.add_eot_token_id(stops[0] if stops else tokenizer.end_of_text_id)
    writer.add_pad_token_id(tokenizer.end_of_text_id)
    writer.add_bos_token_id(tokenizer.end_of_text_id)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
