"""Which share of a card's limit a run reaches: the operations that training needs, over those of its matrix products.

Operations per token, none recomputed: full 6N + 3a, LoRA 4N + 3a + 6 P_lora. N are the matrix parameters that a token
uses, of the body and the head, a the forward operations of causal attention at the mean length of a document.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwentune.facts.architecture import ModelSpec
from qwentune.facts.gpus import GpuSpec
from qwentune.memory.closed_form.adapter_sizes import adapter_parameters
from qwentune.memory.closed_form.roofline import GEMM_EFFICIENCY
from qwentune.memory.settings import Settings


def required_flops(spec: ModelSpec, settings: Settings, document_tokens: float) -> float:
    """Floating-point operations that a token of a document of such a length needs, forward and backward."""
    matrices = spec.active_body_parameters + spec.head_parameters
    attention = 2 * spec.num_attention_layers * spec.query_size * document_tokens
    if settings.kind == "full":
        return 6 * matrices + 3 * attention
    return 4 * matrices + 3 * attention + 6 * adapter_parameters(spec, settings)


@dataclass(frozen=True)
class Limit:
    """What the cards of a run allow: `tflops` of matrix products on each, measured or reckoned from the data sheet."""

    spec: ModelSpec
    settings: Settings
    tflops: float
    is_measured: bool

    @classmethod
    def of(cls, spec: ModelSpec, settings: Settings, gpu: GpuSpec, measured_tflops: float | None) -> Limit | None:
        """The limit on such cards; None where nothing is known of their products in the type of the weights."""
        sheet = gpu.bf16_tflops if settings.weights == "bf16" else gpu.fp32_tflops
        if settings.weights == "bf16" and measured_tflops is not None:
            return cls(spec, settings, measured_tflops, is_measured=True)
        return None if sheet is None else cls(spec, settings, sheet * GEMM_EFFICIENCY, is_measured=False)

    def share(self, tokens: int, documents: int, seconds: float) -> float:
        """The share that was reached where all ranks together trained so many tokens in so many seconds."""
        needed = tokens * required_flops(self.spec, self.settings, tokens / max(1, documents))
        return needed / (self.tflops * 1e12 * self.settings.num_ranks * max(seconds, 1e-9))
