"""What a checkpoint's `generation_config.json` says of how its answers end and are sampled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, TypeAdapter

from qwentune.facts.documents import checked, read_object

GENERATION_CONFIG = "generation_config.json"
_Id = Annotated[int, Ge(0), Lt(2**24)]


class _Content(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    eos_token_id: _Id | list[_Id] | None = None
    pad_token_id: _Id | None = None
    bos_token_id: _Id | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Ge(0)] | None = None
    top_p: Annotated[float, Ge(0), Le(1)] | None = None
    top_k: Annotated[int, Ge(0)] | None = None
    min_p: Annotated[float, Ge(0), Le(1)] | None = None
    repetition_penalty: Annotated[float, Gt(0)] | None = None


# How tokens are drawn, where a file does not say it: as they come, as vLLM and SGLang do.
_AS_THEY_COME: dict[str, float | None] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
}
_KIND = TypeAdapter(_Content)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The content of the file, empty where there is none; UsageError with every key that is of another kind."""
    path = folder / GENERATION_CONFIG
    values = read_object(path, optional=True)
    checked(values, _KIND, path)
    return values


def end_token_ids(generation: dict[str, Any]) -> list[int]:
    """The tokens at which an answer ends."""
    ends: int | list[int] | None = generation.get("eos_token_id")
    return [] if ends is None else [ends] if isinstance(ends, int) else ends


def as_trained(generation: dict[str, Any], stop_token_ids: Iterable[int], end_of_text_id: int) -> dict[str, Any]:
    """A checkpoint's generation config once answers were trained to end so, its own stop tokens besides."""
    stops = dict.fromkeys([*stop_token_ids, *end_token_ids(generation)])
    pad = generation.get("pad_token_id", end_of_text_id)
    return {**generation, "eos_token_id": list(stops), "pad_token_id": pad}


def samples(generation: Mapping[str, Any]) -> bool:
    """Whether the file says that tokens are drawn, not that the likeliest is taken."""
    return bool(generation.get("do_sample")) and generation.get("temperature") != 0


def sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The options of transformers' `generate` by which tokens are drawn as the file says."""
    said = {name: generation.get(name) for name in _AS_THEY_COME}
    drawn = {name: usual if said[name] is None else said[name] for name, usual in _AS_THEY_COME.items()}
    return {"do_sample": True, **drawn, "temperature": drawn["temperature"] or 1.0}
