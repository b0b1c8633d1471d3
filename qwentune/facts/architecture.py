"""The dimensions of a decoder, and the parameter counts that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["base", "chat", "hybrid", "thinking"]


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """The experts of one layer; `shared_intermediate` is 0 where no shared expert runs for every token."""

    num_experts: int
    top_k: int
    expert_intermediate: int
    shared_intermediate: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One text checkpoint: what determines its bytes, its FLOPs and its way of answering.

    `vocab_rows` counts embedding rows (padded vocabulary). `kind` is base, chat (instruct without thinking), hybrid
    (thinking can be switched) or thinking (always thinks). In a mixture of experts every layer is one and
    `intermediate_size` is unused.
    """

    id: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_rows: int
    tied: bool
    max_positions: int
    rope_theta: float
    qkv_bias: bool
    qk_norm: bool
    kind: Kind
    moe: MoeSpec | None
    licence: str
    source: str

    @property
    def query_size(self) -> int:
        """Width of the queries of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys (or the values) of all key/value heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def dense_intermediate(self) -> int:
        """Width of the feed-forward block that runs for every token: the MLP, or the shared expert."""
        return self.intermediate_size if self.moe is None else self.moe.shared_intermediate

    @property
    def linear_parameters_per_layer(self) -> int:
        """Weights held in `nn.Linear` modules: attention and the dense feed-forward block, without biases."""
        attention = 2 * self.hidden_size * (self.query_size + self.kv_size)
        shared_gate = self.hidden_size if self.moe is not None and self.moe.shared_intermediate else 0
        return attention + 3 * self.hidden_size * self.dense_intermediate + shared_gate

    @property
    def expert_parameters_per_layer(self) -> int:
        """Weights of the routed experts of one layer, which transformers keeps as fused 3-D parameters."""
        if self.moe is None:
            return 0
        return self.moe.num_experts * 3 * self.hidden_size * self.moe.expert_intermediate

    @property
    def other_parameters_per_layer(self) -> int:
        """Norms, biases and the router of one layer."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        biases = self.query_size + 2 * self.kv_size if self.qkv_bias else 0
        router = self.moe.num_experts * self.hidden_size if self.moe else 0
        return norms + biases + router

    @property
    def parameters_per_layer(self) -> int:
        """All parameters of one decoder layer."""
        return self.linear_parameters_per_layer + self.expert_parameters_per_layer + self.other_parameters_per_layer

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head; tied models share them with the embedding."""
        return self.vocab_rows * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Embedding and output head together, counted once where they are tied."""
        return self.head_parameters * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.num_layers * self.parameters_per_layer + self.embedding_parameters + self.hidden_size

    @property
    def active_body_parameters(self) -> int:
        """Matrix weights that one token meets in the layers: all of a dense model, `top_k` experts of an MoE."""
        active = self.linear_parameters_per_layer
        if self.moe is not None:
            active += self.expert_parameters_per_layer * self.moe.top_k // self.moe.num_experts
            active += self.moe.num_experts * self.hidden_size
        return self.num_layers * active
