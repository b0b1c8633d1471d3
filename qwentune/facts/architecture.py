"""The dimensions of a decoder, and the parameter counts that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from qwentune.facts.tower_spec import TowerSpec

Kind: TypeAlias = Literal["base", "chat", "hybrid", "thinking"]


# PEFT 0.21 adapts the fused experts of these by the names of the feed-forward block; gate and up are one matrix there.
FUSED_ADAPTED_EXPERTS = ("qwen3_moe", "qwen3_next")


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """The experts of one layer; `shared_intermediate` is 0 where no shared expert runs for every token."""

    num_experts: int
    top_k: int
    expert_intermediate: int
    shared_intermediate: int = 0


@dataclass(frozen=True, slots=True)
class LinearAttentionSpec:
    """Gated DeltaNet, which stands for attention in all but every `period`-th layer; head sizes are per head."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int = 4
    period: int = 4

    @property
    def key_size(self) -> int:
        """Width of the keys (or the queries) of all heads together."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Width of the values of all heads together."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_size + self.value_size


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One text decoder: what determines its bytes, its FLOPs and its way of answering.

    `vocab_rows` counts embedding rows (padded vocabulary). `kind` is base, chat (instruct without thinking), hybrid
    (thinking can be switched) or thinking (always thinks). In a mixture of experts every layer is one and
    `intermediate_size` is unused. With `linear_attention` the layers of full attention have an output gate. `tower_of`
    is the model type of a checkpoint that sees or hears too, and `tower` what does, which is not counted in here.
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
    linear_attention: LinearAttentionSpec | None = None
    tower_of: str | None = None
    tower: TowerSpec | None = None

    @property
    def checkpoint_type(self) -> str:
        """The model type that the checkpoint's config.json names."""
        return self.tower_of or self.model_type

    @property
    def period(self) -> int:
        """After how many layers the model repeats itself."""
        return 1 if self.linear_attention is None else self.linear_attention.period

    @property
    def num_attention_layers(self) -> int:
        """Layers of full attention; the others have linear attention."""
        return self.num_layers // self.period

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
    def query_outputs(self) -> int:
        """What `q_proj` gives: queries, and in a layer with an output gate as many gates."""
        return self.query_size * (1 if self.linear_attention is None else 2)

    @property
    def linear_parameters(self) -> int:
        """Weights held in the layers' `nn.Linear` modules: attention and dense feed-forward blocks, without biases."""
        attention = self.hidden_size * (self.query_outputs + self.query_size + 2 * self.kv_size)
        shared_gate = self.hidden_size if self.moe is not None and self.moe.shared_intermediate else 0
        feed_forward = 3 * self.hidden_size * self.dense_intermediate + shared_gate
        total = self.num_attention_layers * attention + self.num_layers * feed_forward
        if (linear := self.linear_attention) is not None:
            outputs = linear.conv_size + linear.value_size + 2 * linear.num_value_heads
            mixer = self.hidden_size * (outputs + linear.value_size)
            total += (self.num_layers - self.num_attention_layers) * mixer
        return total

    @property
    def expert_parameters_per_layer(self) -> int:
        """Weights of the routed experts of one layer, which transformers keeps as fused 3-D parameters."""
        if self.moe is None:
            return 0
        return self.moe.num_experts * 3 * self.hidden_size * self.moe.expert_intermediate

    @property
    def other_parameters(self) -> int:
        """The layers' norms, biases, routers, convolutions and decays."""
        attention = 2 * self.head_dim if self.qk_norm else 0
        attention += self.query_outputs + 2 * self.kv_size if self.qkv_bias else 0
        router = self.moe.num_experts * self.hidden_size if self.moe else 0
        total = self.num_attention_layers * attention + self.num_layers * (2 * self.hidden_size + router)
        if (linear := self.linear_attention) is not None:
            mixer = linear.conv_kernel * linear.conv_size + 2 * linear.num_value_heads + linear.value_head_dim
            total += (self.num_layers - self.num_attention_layers) * mixer
        return total

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
        layers = self.linear_parameters + self.num_layers * self.expert_parameters_per_layer + self.other_parameters
        return layers + self.embedding_parameters + self.hidden_size

    @property
    def all_parameters(self) -> int:
        """All parameters of the checkpoint, what sees and hears included."""
        return self.parameters + (0 if self.tower is None else self.tower.parameters)

    @property
    def takes(self) -> tuple[str, ...]:
        """The kinds of content that the model takes."""
        if self.tower is None:
            return ("text",)
        if self.tower.vision is None:
            return ("text", "audio")
        return ("text", "image", "video" if self.tower.audio is None else "audio")

    @property
    def active_body_parameters(self) -> int:
        """Matrix weights that one token meets in the layers: all of a dense model, `top_k` experts of an MoE."""
        active = self.linear_parameters
        if self.moe is not None:
            experts = self.expert_parameters_per_layer * self.moe.top_k // self.moe.num_experts
            active += self.num_layers * (experts + self.moe.num_experts * self.hidden_size)
        return active
