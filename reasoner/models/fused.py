"""Layers of a transformers model whose work between the matmuls goes to the kernels of kernels/elementwise.py.

Each module keeps its weights, its names and its class's place: it becomes an instance of a subclass of its own class,
whose forward takes the kernels where they take a call and is transformers' own everywhere else. So a CPU, attention
that is not packed, a norm that is trained and another dtype run what transformers wrote. Left out: the sum at the end
of a layer, which the next layer's norm could make, because a layer hands one tensor on.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from reasoner.kernels import elementwise
from reasoner.models.attention import PACKED, packed_attention
from reasoner.models.gated_down import gated_down

ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}  # whether it is gelu's tanh form


def fuse(model: PreTrainedModel, family: str) -> int:
    """Turn the model's norms, attentions, gated MLPs and layers into ours; how many became so. For families whose row
    in families.py is `fused`."""
    gemma = family.startswith("gemma")
    activation = getattr(model.config, "hidden_activation" if gemma else "hidden_act")
    kinds: list[tuple[str, type]] = [
        ("RMSNorm", GemmaNorm if gemma else Norm),
        ("Attention", Attention),
        ("DecoderLayer", GemmaLayer if gemma else Layer),
    ]
    if activation in ACTIVATIONS:
        kinds.append(("MLP", HalvedMLP if family == "phi3" else MLP))
    found = 0
    for part in list(model.modules()):
        for ending, ours in kinds:
            if type(part).__name__.endswith(ending) and not isinstance(part, Fused):
                part.__class__ = type(f"Fused{type(part).__name__}", (ours, type(part)), {})
                found += 1
    return found


class Fused:
    """Comes before a module's own class."""


class Norm(Fused, nn.Module):
    """RMSNorm, times its weight."""

    weight: Tensor
    one_plus = False

    @property
    def epsilon(self) -> float:
        """What is added to the mean of squares: the classes differ in its name."""
        found = self.__dict__
        return found["eps"] if "eps" in found else found["variance_epsilon"]

    def kernels(self, x: Tensor) -> Any:
        """The kernels, where they take this norm of x."""
        return None if self.weight.requires_grad else elementwise.fast(elementwise.PREFER_NORM, x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        kernels = self.kernels(x)
        if kernels is None:
            return super().forward(x)
        return kernels.norm(x, self.weight, self.epsilon, one_plus=self.one_plus)

    def added(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + residual (x where there is none), and its norm."""
        kernels = self.kernels(x)
        if kernels is None:
            total = x if residual is None else residual + x
            return total, super().forward(total)
        return kernels.add_norm(x, residual, self.weight, self.epsilon, one_plus=self.one_plus)


class GemmaNorm(Norm):
    """RMSNorm, times 1 + its weight."""

    one_plus = True


class MLP(Fused, nn.Module):
    """down(activation(gate(x)) * up(x))."""

    config: PretrainedConfig
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    @property
    def tanh(self) -> bool:
        """Whether the activation is gelu's tanh form and not silu."""
        return ACTIVATIONS[getattr(self.config, "hidden_activation", None) or self.config.hidden_act]

    def forward(self, x: Tensor, *, read: bool = True) -> Tensor:
        """[.., D] -> [.., D]. Nobody but the product reads gate and up, so their gradients are written over them. With
        `read=False` the output may be left empty: it is there for its graph."""
        kernels = elementwise.fast(elementwise.PREFER_GATED, x)
        if kernels is None:
            return super().forward(x)
        return gated_down(self.down_proj, kernels, self.gate_proj(x), self.up_proj(x), tanh=self.tanh, read=read)


class HalvedMLP(MLP):
    """The same, where gate and up are the halves of one projection: Phi-3."""

    gate_up_proj: nn.Module

    def forward(self, x: Tensor, *, read: bool = True) -> Tensor:
        """As MLP's."""
        kernels = elementwise.fast(elementwise.PREFER_GATED, x)
        if kernels is None:
            return super(MLP, self).forward(x)
        return gated_down(self.down_proj, kernels, self.gate_up_proj(x), None, tanh=self.tanh, read=read)


class Attention(Fused, nn.Module):
    """Packed attention whose query and key are turned by one kernel."""

    config: PretrainedConfig
    head_dim: int
    scaling: float
    attention_dropout: float
    sliding_window: int | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    qkv_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    o_proj: nn.Module

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **given: Any) -> tuple[Tensor, Any]:
        """[1, N, D] -> [1, N, D], and None. Raises ValueError where packed attention does: a cache, a mask."""
        kernels = None
        if self.config._attn_implementation == PACKED and len(hidden_states) == 1:
            kernels = elementwise.fast(elementwise.PREFER_ROTARY, hidden_states, *position_embeddings)
        if kernels is None:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **given)
        query, key, value = (part.transpose(1, 2) for part in self._projected(hidden_states))
        query, key = kernels.rotate(query, key, *position_embeddings)
        attended, _ = packed_attention(
            self,
            query,
            key,
            value,
            given.pop("attention_mask", None),
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            sliding_window=self._window(),
            softcap=self.config.attn_logit_softcapping if self.config.model_type == "gemma2" else None,
            **given,
        )
        return self.o_proj(attended.flatten(2)), None

    def _projected(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value [1, N, heads, d], the first two normed where the family does so."""
        if hasattr(self, "qkv_proj"):
            heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
            joined = self.qkv_proj(hidden).unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
            return joined.split([heads, kv_heads, kv_heads], dim=2)
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def _window(self) -> int | None:
        """Of this layer, where layers differ; else the model's, where its layers use one."""
        if "sliding_window" in self.__dict__:
            return self.sliding_window
        return getattr(self.config, "sliding_window", None) if self.config.model_type in ("mistral", "phi3") else None


class Layer(Fused, nn.Module):
    """A decoder layer with a norm before attention and one before the MLP, the second of a sum. Phi-3's dropouts are
    left out: a base stays in eval mode (policy.py)."""

    input_layernorm: Norm
    post_attention_layernorm: Norm
    self_attn: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        """[1, N, D] -> [1, N, D]."""
        if args or self.input_layernorm.kernels(hidden_states) is None:
            return super().forward(hidden_states, *args, **given)
        residual, x = self.input_layernorm.added(hidden_states, None)
        x, _ = self.self_attn(hidden_states=x, **given)
        residual, x = self._before_mlp(x, residual)
        return residual + self._after_mlp(self.mlp(x))

    def _before_mlp(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.post_attention_layernorm.added(x, residual)

    def _after_mlp(self, x: Tensor) -> Tensor:
        return x


class GemmaLayer(Layer):
    """The same with a norm after attention and after the MLP too."""

    pre_feedforward_layernorm: Norm
    post_feedforward_layernorm: Norm

    def _before_mlp(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.pre_feedforward_layernorm.added(self.post_attention_layernorm(x), residual)

    def _after_mlp(self, x: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(x)
