"""DeepSpeed's optimizer shards, which it would unpickle without restriction."""

from __future__ import annotations

from typing import Any


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
