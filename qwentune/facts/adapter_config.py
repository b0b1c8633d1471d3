"""What a LoRA adapter's `adapter_config.json` says, read without PEFT and torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt
from pydantic import BaseModel, ConfigDict, TypeAdapter

from qwentune.errors import ResumeError, UsageError
from qwentune.facts.documents import checked, read_object

ADAPTER_CONFIG = "adapter_config.json"
_Index = Annotated[int, Ge(0), Lt(2**24)]


class _Content(BaseModel):
    """The keys that decide shapes and scale; PEFT checks the others."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"] = "LORA"
    r: Annotated[int, Ge(1), Le(2**16)]
    target_modules: list[str] | str | None
    lora_alpha: Annotated[float, Ge(0), Le(2**24)] = 8
    lora_dropout: Annotated[float, Ge(0), Lt(1)] | None = 0.0
    target_parameters: list[str] | None = None
    trainable_token_indices: list[_Index] | dict[str, list[_Index]] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    base_model_name_or_path: str | None = None


_KIND = TypeAdapter(_Content)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter in `folder`; ResumeError with every key that is of another kind."""
    path = folder / ADAPTER_CONFIG
    try:
        values = read_object(path)
        checked(values, _KIND, path)
    except UsageError as error:
        raise ResumeError(error.problems) from None
    return values


def largest_trained_token(config: dict[str, Any]) -> int:
    """The largest of the ids whose rows the adapter trains; -1 where it trains none."""
    indices: list[int] | dict[str, list[int]] = config.get("trainable_token_indices") or []
    lists: list[list[int]] = [*indices.values()] if isinstance(indices, dict) else [indices]
    return max((index for listed in lists for index in listed), default=-1)
