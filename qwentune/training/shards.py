"""DeepSpeed's defaults that are not safe or not small: unpickled shards, buckets of two gigabytes."""

from __future__ import annotations

from typing import Any

from qwentune.memory.closed_form.model_states import DEEPSPEED_BUCKET_VALUES


def load_only_weights() -> None:
    """Makes DeepSpeed read its shards with `weights_only`, its own two classes in them allowed by name.

    It has no option for that. A shard that holds anything else raises pickle.UnpicklingError and runs nothing.
    """
    import torch
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]

    def load(self: Any, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location=map_location, weights_only=True)

    TorchCheckpointEngine.load = load


def configure(accelerator: Any, model: Any, *, adds_in_fp32: bool) -> None:
    """Makes DeepSpeed hold what the plan reckons, before it has seen the model; nothing where it is not used.

    Its bucket for gradients, which is allocated whole, is no larger than all of them. Stages 2 and 3 add gradients up
    in fp32: sums in bf16 lose more with every micro-batch, and are copied twice in the step. Stage 1, where that takes
    the room of all gradients, does so where the plan says so (`adds_in_fp32`). Offloaded states are our AdamW's too:
    DeepSpeed's own would be compiled here, and be another optimizer than on the GPU.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    config = plugin.deepspeed_config
    options = config["zero_optimization"]
    offloads = options["offload_optimizer"]["device"] != "none"
    if offloads:
        config["zero_force_ds_cpu_optimizer"] = False
    if options["stage"] == 3 or adds_in_fp32 or (options["stage"] == 2 and not offloads):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    asked = options.get("reduce_bucket_size", DEEPSPEED_BUCKET_VALUES)
    most = int(asked) if isinstance(asked, int | float) else DEEPSPEED_BUCKET_VALUES
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A parameter that stage 3 has shared out already holds nothing itself.
    num_trained = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
    options["reduce_bucket_size"] = min(most, num_trained)
