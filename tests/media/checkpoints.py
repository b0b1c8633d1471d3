"""Tiny checkpoint folders of the nine classes that see or hear: the files that a published folder has.

Configuration, tokenizer with the family's control tokens, chat template, preprocessor files, and random weights if
asked. Templates of Qwen2-VL, 2.5-VL, 3-VL and 3.5 are TRL's copies, that of Qwen2-Audio stands in transformers'
processor; those of the Omni models (`TEST_TEMPLATES`) are ours, in their manner.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from tests import qwen3_5
from tests.checkpoints import ROWS_MULTIPLE, SMALL_NUM_RANKS, template_text, token_ids, write_tokenizer

MediaType: TypeAlias = Literal[
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen2_audio",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
]
Settings: TypeAlias = dict[str, Any]

TYPES: tuple[MediaType, ...] = get_args(MediaType)
SEES = tuple(name for name in TYPES if name != "qwen2_audio")
HEARS: tuple[MediaType, ...] = ("qwen2_audio", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
HYBRIDS: tuple[MediaType, ...] = ("qwen3_5", "qwen3_5_moe")  # linear attention: one example a row
TEST_TEMPLATES: tuple[MediaType, ...] = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
SCALE = 4.0  # of the matrices: at the usual 0.02 a tiny model hardly looks at its picture
HEAD_DIM = 16

ARCHITECTURES: dict[MediaType, str] = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
}

# The vocabulary of Qwen2 has these where that of Qwen2.5 has the marks of boxes and pictures.
AUDIO_NAMES = {
    "<|object_ref_start|>": "<|AUDIO|>",
    "<|object_ref_end|>": "<|audio_bos|>",
    "<|box_start|>": "<|audio_eos|>",
}
OMNI_NAMES = {
    **AUDIO_NAMES,
    "<|vision_start|>": "<|vision_bos|>",
    "<|vision_end|>": "<|vision_eos|>",
    "<|image_pad|>": "<|IMAGE|>",
    "<|video_pad|>": "<|VIDEO|>",
}
SPEECH_TOKENS = ("<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")
SPEECH_TOKENS += ("<tts_text_bos_single>", "<|audio_pad|>")
RENAMED: dict[str, dict[str, str]] = {"qwen2_audio": AUDIO_NAMES, "qwen2_5_omni_thinker": OMNI_NAMES}

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PATCHES_14: Settings = {
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "temporal_patch_size": 2,
}
PATCHES_16: Settings = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "temporal_patch_size": 2,
}
MEL: Settings = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16000,
}
LONG_MEL = {**MEL, "chunk_length": 300, "n_samples": 4800000, "nb_max_frames": 30000}

# One mark a part, tools unread: as modalities.md describes the template of Qwen2.5-Omni.
OMNI_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}IMAGE"
    "{% elif part['type'] == 'video' or 'video' in part %}VIDEO"
    "{% elif part['type'] == 'audio' or 'audio' in part or 'audio_url' in part %}AUDIO"
    "{% elif 'text' in part %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OMNI_MARKS: dict[MediaType, dict[str, str]] = {
    "qwen2_5_omni_thinker": {
        "IMAGE": "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "VIDEO": "<|vision_bos|><|VIDEO|><|vision_eos|>",
        "AUDIO": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    },
    "qwen3_omni_moe_thinker": {
        "IMAGE": "<|vision_start|><|image_pad|><|vision_end|>",
        "VIDEO": "<|vision_start|><|video_pad|><|vision_end|>",
        "AUDIO": "<|audio_start|><|audio_pad|><|audio_end|>",
    },
}


def write_media_checkpoint(
    folder: Path,
    model_type: MediaType,
    *,
    num_ranks: int | None = SMALL_NUM_RANKS,
    hidden: int = 64,
    theta: float | None = None,
    template: str | None = None,
) -> Path:
    """Write all files but the weights, and return the folder; `add_media_weights` adds those.

    Args:
        num_ranks: Size of the vocabulary before control tokens; None builds the real one, in seconds.
        hidden: Width of the decoder, a multiple of 64; towers have half of it.
        theta: Base of the decoder's rotary positions instead of the published: at a million, a head of 16 numbers tells
            neighbouring rows of a picture apart by a thirtieth of a turn at most.
        template: The text of a chat template instead of the family's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_family_tokenizer(folder, model_type, num_ranks)
    (folder / "chat_template.jinja").write_text(template or media_template(model_type), encoding="utf-8")
    config = media_config(model_type, token_ids(folder), hidden)
    if theta is not None:
        text = config.get("text_config", config)
        text.get("rope_parameters", text)["rope_theta"] = theta
    files = {**preprocessor_files(model_type), "config.json": config}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def media_template(model_type: MediaType) -> str:
    """The chat template of a type."""
    if model_type in OMNI_MARKS:
        text = OMNI_TEMPLATE
        for name, marks in OMNI_MARKS[model_type].items():
            text = text.replace("%}" + name, "%}" + marks)
        return text
    if model_type == "qwen2_audio":
        from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor

        return str(Qwen2AudioProcessor.default_chat_template.fget(None))
    if model_type in ("qwen2_vl", "qwen2_5_vl"):
        return template_text("qwen2_5_vl")
    return template_text("qwen3_vl" if model_type.startswith("qwen3_vl") else "qwen3_5_think")


def write_family_tokenizer(folder: Path, model_type: MediaType, num_ranks: int | None) -> None:
    """Write tokenizer.json and tokenizer_config.json with the control tokens that the type has."""
    if model_type.startswith("qwen3_5"):
        qwen3_5.write_tokenizer(folder, num_ranks)
        return
    write_tokenizer(folder, "qwen3" if model_type.startswith("qwen3") else "qwen2.5", num_ranks)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text("utf-8")
        for old, new in RENAMED.get(model_type, {}).items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    if model_type == "qwen3_omni_moe_thinker":
        _append_tokens(folder, SPEECH_TOKENS)


def _append_tokens(folder: Path, tokens: tuple[str, ...]) -> None:
    """Give control tokens the next ids, in both files."""
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    like = document["added_tokens"][0]
    first = max(token["id"] for token in document["added_tokens"]) + 1
    for token_id, token in enumerate(tokens, start=first):
        document["added_tokens"].append({**like, "id": token_id, "content": token})
        flags = {name: value for name, value in like.items() if name != "id"}
        config["added_tokens_decoder"][str(token_id)] = {**flags, "content": token}
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def preprocessor_files(model_type: MediaType) -> dict[str, Settings]:
    """The preprocessor files by name, as published (quoted in public code; Omni's partly from memory)."""
    slow = {"image_processor_type": "Qwen2VLImageProcessor"}
    if model_type == "qwen2_audio":
        return {"preprocessor_config.json": {**MEL, "processor_class": "Qwen2AudioProcessor"}}
    if model_type == "qwen2_5_omni_thinker":
        files = {**LONG_MEL, **PATCHES_14, **slow, "dither": 0.0, "processor_class": "Qwen2_5OmniProcessor"}
        return {"preprocessor_config.json": files}
    if model_type == "qwen3_omni_moe_thinker":
        limits = {"max_pixels": 12845056, "min_pixels": 3136}
        files = {**LONG_MEL, **PATCHES_16, **slow, **limits, "dither": 0.0}
        return {"preprocessor_config.json": {**files, "processor_class": "Qwen3OmniMoeProcessor"}}
    if model_type in ("qwen2_vl", "qwen2_5_vl"):
        name = "Qwen2VLProcessor" if model_type == "qwen2_vl" else "Qwen2_5_VLProcessor"
        return {"preprocessor_config.json": {**PATCHES_14, **slow, "processor_class": name}}
    pictures = {**PATCHES_16, "size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    videos = {**PATCHES_16, "size": {"longest_edge": 25165824, "shortest_edge": 4096}}
    return {
        "preprocessor_config.json": {
            **pictures,
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            **videos,
            "processor_class": "Qwen3VLProcessor",
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }


def let_pictures_be_small(folder: Path, least_pixels: int) -> None:
    """Lets the folder itself say so, where its pictures have more pixels at least than that."""
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text("utf-8"))
    if "size" in content:
        content["size"]["shortest_edge"] = least_pixels
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def media_config(model_type: MediaType, ids: dict[str, int], hidden: int = 64) -> Settings:
    """The content of config.json in the published layout (Qwen2-VL and 2.5-VL: the decoder's keys at the top)."""
    num_rows = -(-(max(ids.values()) + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    text: Settings = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 32768,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "vocab_size": num_rows,
    }
    top: Settings = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type, "torch_dtype": "float32"}
    if model_type == "qwen2_audio":
        text |= {"model_type": "qwen2", "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
        audio = _ear(hidden) | {"model_type": "qwen2_audio_encoder"}
        return top | {"audio_token_index": ids["<|AUDIO|>"], "audio_config": audio, "text_config": text}
    if model_type == "qwen2_5_omni_thinker":
        text |= {"model_type": "qwen2_5_omni_text", "rope_theta": 1e6, "rope_scaling": _mrope([2, 3, 3])}
        return top | {
            "audio_config": _ear(hidden) | {"model_type": "qwen2_5_omni_audio_encoder", "n_window": 100},
            "vision_config": _windowed_eye(hidden) | {"model_type": "qwen2_5_omni_vision_encoder"},
            "text_config": text | {"tie_word_embeddings": False},
            "audio_token_index": ids["<|AUDIO|>"],
            "image_token_index": ids["<|IMAGE|>"],
            "video_token_index": ids["<|VIDEO|>"],
            "audio_start_token_id": ids["<|audio_bos|>"],
            "audio_end_token_id": ids["<|audio_eos|>"],
            "vision_start_token_id": ids["<|vision_bos|>"],
            "vision_end_token_id": ids["<|vision_eos|>"],
            "position_id_per_seconds": 25,
            "seconds_per_chunk": 2,
            "tie_word_embeddings": False,
        }
    top |= {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"),
    }
    if model_type in ("qwen2_vl", "qwen2_5_vl"):
        rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        more = {"max_window_layers": 2, "sliding_window": 32768, "use_sliding_window": False}
        eye = _windowed_eye(hidden) | {"tokens_per_second": 2, "spatial_patch_size": 14}
        if model_type == "qwen2_vl":
            eye = {"depth": 2, "embed_dim": hidden // 2, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2}
            eye |= {"in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
        return top | text | rope | more | {"vision_config": eye}

    text |= {"head_dim": HEAD_DIM, "attention_bias": False}
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    if model_type in ("qwen3_5", "qwen3_5_moe"):
        rope = _mrope([2, 1, 1], interleaved=True) | {"rope_theta": 1e7, "partial_rotary_factor": 0.5}
        text |= {
            "model_type": f"{model_type}_text",
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "full_attention_interval": 4,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "rope_parameters": rope,
            "tie_word_embeddings": top["tie_word_embeddings"],
        }
        if model_type == "qwen3_5_moe":
            text |= experts | {"shared_expert_intermediate_size": 32}
        return top | {
            "text_config": text,
            "vision_config": _eye(hidden) | {"model_type": model_type, "num_position_embeddings": 576},
        }
    rope = {"rope_theta": 5e6, "rope_scaling": _mrope([3, 3, 2], interleaved=True)}
    if model_type == "qwen3_vl":
        text |= rope | {"model_type": "qwen3_vl_text", "tie_word_embeddings": True}
    elif model_type == "qwen3_vl_moe":
        text |= rope | experts | {"model_type": "qwen3_vl_moe_text", "decoder_sparse_step": 1, "mlp_only_layers": []}
        text |= {"norm_topk_prob": True, "tie_word_embeddings": False}
    else:
        text |= {"rope_theta": 1e6, "rope_scaling": _mrope([3, 3, 2], interleaved=True), "mlp_only_layers": []}
        text |= experts | {"model_type": "qwen3_omni_moe_text", "decoder_sparse_step": 1, "norm_topk_prob": True}
        top |= {
            "audio_config": _ear(hidden)
            | {"model_type": "qwen3_omni_moe_audio_encoder", "n_window": 50, "n_window_infer": 800}
            | {"downsample_hidden_size": 8, "conv_chunksize": 500},
            "audio_token_id": ids["<|audio_pad|>"],
            "audio_start_token_id": ids["<|audio_start|>"],
            "audio_end_token_id": ids["<|audio_end|>"],
            "position_id_per_seconds": 13,
        }
    kind = "qwen3_omni_moe_vision_encoder" if model_type == "qwen3_omni_moe_thinker" else model_type
    return top | {"text_config": text, "vision_config": _eye(hidden, deepstack=[0, 1]) | {"model_type": kind}}


def _mrope(section: list[int], *, interleaved: bool = False) -> Settings:
    """How the three axes of a position share a head."""
    rope: Settings = {"mrope_section": section, "rope_type": "default"}
    return rope | ({"mrope_interleaved": True} if interleaved else {})


def _eye(hidden: int, *, deepstack: list[int] | None = None) -> Settings:
    """A tower of three blocks, as Qwen3-VL and 3.5 have it."""
    return {
        "depth": 3,
        "hidden_size": hidden // 2,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "intermediate_size": hidden,
        "num_heads": 2,
        "num_position_embeddings": 2304,
        "out_hidden_size": hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    } | ({} if deepstack is None else {"deepstack_visual_indexes": deepstack})


def _windowed_eye(hidden: int) -> Settings:
    """A tower of two blocks, the first within windows, as Qwen2.5-VL and Omni have it."""
    return {
        "depth": 2,
        "hidden_size": hidden // 2,
        "hidden_act": "silu",
        "in_channels": 3,
        "intermediate_size": hidden,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }


def _ear(hidden: int) -> Settings:
    """A Whisper-like encoder of two layers."""
    return {
        "num_mel_bins": 128,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": hidden,
        "d_model": hidden // 2,
        "output_dim": hidden,
        "max_source_positions": 1500,
        "dropout": 0.0,
        "activation_function": "gelu",
    }


def add_media_weights(folder: Path, seed: int = 0, scale: float = SCALE) -> Path:
    """Save random fp32 weights, the matrices scaled up, and generation_config.json; returns the folder.

    The caller's random state is left as it was; the same seed gives the same weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForMultimodalLM, GenerationConfig

    ids = token_ids(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    config = (folder / "config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "config.json").write_bytes(config)  # as published, not as the installed transformers writes it
    return folder
