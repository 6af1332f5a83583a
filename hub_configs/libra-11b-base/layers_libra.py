"""The vision half of each decoder layer, and how it runs beside the LLM's half.

| paper | here |
|---|---|
| hybrid image tokens (3.2) | [`LibraHybridEmbedding`] |
| routed visual expert (3.3) | [`LowRankLinear`], [`LibraRoutedLayer`], [`LibraVisionMLP`] |
| cross-modal bridge (3.3) | [`LibraRoutedAttention`], and what of it a cache remembers: [`BridgeMemory`] |

Rows of both modalities are two streams, packed without padding (see [`Routing`]): language rows `(language rows,
hidden)` and vision rows `(vision rows, hidden)`. They meet in attention only. Without vision rows there is no routing at
all: `(batch, length, hidden)` passes through the LLM's own modules.

The last step of a sum or product is done in place where its left side is fresh: writing new memory costs as much as
computing what goes into it.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_libra import attend
from .cache_libra import CACHE_NAME, BridgeMemory
from .configuration_libra import LibraConfig
from .image_blocks_libra import codebook_entries
from .routing_libra import LowRankLinear, Routing


class LibraRMSNorm(nn.Module):
    """
    RMSNorm of vision rows, computed in float32 as the LLM's, in fewer passes over the rows.

    Args:
        hidden_size (`int`): width of the rows.
        eps (`float`): added to the mean of squares.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From `(..., hidden_size)` to the same shape and dtype."""
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / hidden_states.shape[-1] + self.eps).rsqrt()
        return (hidden_states * scale).to(hidden_states.dtype).mul_(self.weight)


class LibraVisionMLP(nn.Module):
    """The gated MLP of the visual expert: the LLM's, with low-rank maps."""

    def __init__(self, config: LibraConfig):
        super().__init__()
        hidden, inner = config.text_config.hidden_size, config.text_config.intermediate_size
        self.gate_proj = LowRankLinear(hidden, inner, inner // config.expert_down_ratio)
        self.up_proj = LowRankLinear(hidden, inner, inner // config.expert_down_ratio)
        self.down_proj = LowRankLinear(inner, hidden, hidden // config.expert_down_ratio)
        self.act_fn = ACT2FN[config.text_config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From `(rows, hidden)` to `(rows, hidden)`."""
        gate = self.act_fn(self.gate_proj(hidden_states))
        return self.down_proj(self.up_proj(hidden_states).mul_(gate))


class LibraRoutedAttention(nn.Module):
    """
    Attention over both modalities, with the visual expert's projections and the cross-modal bridge.

    With K the plain keys, a query sees `K_j` when its modality is that of token j and `K_j + bridge_K(x_j)` when it is
    not; values likewise. So keys and values have two views, and every query attends to one of them:

    - the language view: text rows plain, vision rows bridged;
    - the vision view: vision rows plain, text rows bridged.

    The cache holds the language view, and the latents from which the vision view is rebuilt ([`BridgeMemory`]).
    """

    def __init__(self, config: LibraConfig, layer_idx: int):
        super().__init__()
        text = config.text_config
        self.layer_idx = layer_idx
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        query_size = text.num_attention_heads * self.head_dim
        key_size = text.num_key_value_heads * self.head_dim
        ratio = config.expert_down_ratio
        self.has_head_norms = text.model_type == "qwen3"
        if config.use_expert:
            self.q_proj = LowRankLinear(text.hidden_size, query_size, query_size // ratio)
            self.k_proj = LowRankLinear(text.hidden_size, key_size, key_size // ratio)
            self.v_proj = LowRankLinear(text.hidden_size, key_size, key_size // ratio)
            self.o_proj = LowRankLinear(query_size, text.hidden_size, text.hidden_size // ratio)
        if config.use_expert and self.has_head_norms:
            self.q_norm = LibraRMSNorm(self.head_dim, eps=text.rms_norm_eps)
            self.k_norm = LibraRMSNorm(self.head_dim, eps=text.rms_norm_eps)
        self.use_bridge = config.use_bridge
        if config.use_bridge:
            bridge = (text.hidden_size, key_size, config.bridge_rank, True)
            self.k_bridge_on_vision = LowRankLinear(*bridge)
            self.k_bridge_on_language = LowRankLinear(*bridge)
            self.v_bridge_on_vision = LowRankLinear(*bridge)
            self.v_bridge_on_language = LowRankLinear(*bridge)

    def forward(
        self,
        language: torch.Tensor,
        vision: torch.Tensor | None,
        language_attention: Any,
        vision_attention: Any,
        routing: Routing | None,
        position_embeddings: Any,
        cache: Cache | None = None,
        memory: BridgeMemory | None = None,
        only_last: bool = False,
        **kwargs,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        """
        Args:
            language, vision (`torch.Tensor`): normed rows, as [`LibraRoutedLayer.forward`] has them.
            language_attention (`nn.Module`): the LLM's attention of the same layer.
            vision_attention (`nn.Module`): whose projections vision rows use: this one, or without an expert the LLM's.
            routing ([`Routing`] or `None`): `None` when every row is language.
            position_embeddings (`tuple`):
                cos and sin of RoPE: `(batch, length, head_dim)` each; with a routing, such a pair for the language rows
                and one for the vision rows, `(rows, 1, head_dim)` each.
            cache (`Cache`, *optional*): gets the language view.
            memory ([`BridgeMemory`], *optional*): of this cache, when there is a bridge.
            only_last (`bool`, *optional*, defaults to `False`):
                With a routing, whether only the last token of each row asks; all give their keys and values.
            kwargs: passed on to the LLM's attention when every row is language.

        Returns:
            `tuple`: the pair of outputs, one for each row that asks, and, with a routing, the attention weights `(batch,
            heads, length, keys)` when the attention function gives them.
        """
        if routing is None or vision is None:
            if memory is not None:  # an image that follows will need them
                on_language = self.k_bridge_on_language, self.v_bridge_on_language
                memory.remember_latents(self.layer_idx, *(bridge.A(language) for bridge in on_language))
            output, _ = language_attention(
                hidden_states=language,
                position_embeddings=position_embeddings,
                **{CACHE_NAME: cache},
                **kwargs,
            )  # its weights are recorded there
            return (output, None if vision is None else self._idle(vision, vision_attention)), None

        rotary, asking_rotary = position_embeddings, position_embeddings
        asking, asking_rows = routing, (language, vision)
        if only_last and routing.last is not None:
            asking, asking_rows = routing.last, routing.select_last(language, vision)
            asking_rotary = [*zip(*(routing.select_last(*pair) for pair in zip(*rotary)))]
        plain_language = self._keys_and_values(language_attention, language)
        plain_vision = self._keys_and_values(vision_attention, vision)
        read_language, read_vision, latents = self._bridge(language, vision, routing, plain_language, plain_vision)
        key, value = self._view(plain_language, read_vision, rotary, routing)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        query = _rotate(self._queries(language_attention, asking_rows[0]), asking_rotary[0])
        output, weights = attend(language_attention, query, key, value, asking.language, asking)
        language_output = language_attention.o_proj(output.flatten(1))

        if memory is not None:
            latents = memory.remember_latents(self.layer_idx, *latents)
        if memory is not None and routing.total_length > routing.shape[1]:
            key, value = self._rebuild_vision_view(key, value, latents, memory)
        elif self.use_bridge:
            key, value = self._view(read_language, plain_vision, rotary, routing)
        query = _rotate(self._queries(vision_attention, asking_rows[1]), asking_rotary[1])
        output, vision_weights = attend(language_attention, query, key, value, asking.vision, asking)
        vision_output = vision_attention.o_proj(output.flatten(1))
        if weights is not None and vision_weights is not None:
            longer = weights.shape[-1] - vision_weights.shape[-1]  # the view of a static cache has its whole length
            weights = asking.unpack(weights, nn.functional.pad(vision_weights, (0, longer))).transpose(1, 2)
        return (language_output, vision_output), weights

    def _idle(self, vision, vision_attention):
        """Without vision rows in a batch of training: every parameter takes part with none, because DDP waits for it."""
        query = self._queries(vision_attention, vision)
        states = [*self._keys_and_values(vision_attention, vision)]
        if self.use_bridge:
            bridges = (
                self.k_bridge_on_language,
                self.v_bridge_on_language,
                self.k_bridge_on_vision,
                self.v_bridge_on_vision,
            )
            states += [bridge(vision) for bridge in bridges]
        return vision_attention.o_proj(query.flatten(1) + sum(state.sum() for state in states))

    def _queries(self, attention, rows):
        """Queries of one stream by the projection of its side: `(rows, heads, head_dim)`."""
        query = attention.q_proj(rows).unflatten(-1, (-1, self.head_dim))
        return attention.q_norm(query) if self.has_head_norms else query

    def _keys_and_values(self, attention, rows):
        """Plain keys and plain values, likewise: `(rows, key heads, head_dim)` each."""
        key, value = (
            projection(rows).unflatten(-1, (-1, self.head_dim)) for projection in (attention.k_proj, attention.v_proj)
        )
        return attention.k_norm(key) if self.has_head_norms else key, value

    def _bridge(self, language, vision, routing, plain_language, plain_vision):
        """Keys and values of each stream as the other modality reads them, and the bridge's latents in the sequence."""
        if not self.use_bridge:
            return plain_language, plain_vision, None
        on_language = self.k_bridge_on_language, self.v_bridge_on_language
        on_vision = self.k_bridge_on_vision, self.v_bridge_on_vision
        language_latents = [bridge.A(language) for bridge in on_language]  # (language rows, bridge_rank) each
        vision_latents = [bridge.A(vision) for bridge in on_vision]
        read_language = [
            bridge.B(latent).view_as(plain).add_(plain)
            for plain, bridge, latent in zip(plain_language, on_language, language_latents)
        ]
        read_vision = [
            bridge.B(latent).view_as(plain).add_(plain)
            for plain, bridge, latent in zip(plain_vision, on_vision, vision_latents)
        ]
        return read_language, read_vision, [routing.unpack(*pair) for pair in zip(language_latents, vision_latents)]

    def _view(self, language_states, vision_states, rotary, routing):
        """Keys (rotated) and values of both streams in the sequence: `(batch, key heads, length, head_dim)` each."""
        (language_key, language_value), (vision_key, vision_value) = language_states, vision_states
        language_key, vision_key = _rotate(language_key, rotary[0]), _rotate(vision_key, rotary[1])
        pairs = (language_key, vision_key), (language_value, vision_value)
        # Joined as (key heads, rows, head_dim): attention reads keys head by head, and this way they lie so in memory.
        return [routing.unpack(*(rows.transpose(0, 1) for rows in pair), dim=1).transpose(0, 1) for pair in pairs]

    def _rebuild_vision_view(self, key, value, latents, memory):
        """
        The vision view of all cached tokens: the language view, plus the bridge's term on language rows, less that on
        vision rows. (RoPE is linear: terms are rotated and added.)
        """
        kind = memory.layer_types[self.layer_idx]
        is_vision = memory.is_vision(kind)[..., None]  # (batch, keys, 1)
        bridges = (
            (self.k_bridge_on_language, self.k_bridge_on_vision),
            (self.v_bridge_on_language, self.v_bridge_on_vision),
        )
        key_term, value_term = (
            on_language.B(latent.masked_fill(is_vision, 0)) - on_vision.B(latent.masked_fill(~is_vision, 0))
            for latent, (on_language, on_vision) in zip(latents, bridges)
        )  # (batch, keys, key heads * head_dim) each
        cos, sin = memory.rotary[kind]
        key_term = _rotate(key_term.unflatten(-1, (-1, self.head_dim)), (cos[:, :, None], sin[:, :, None]))
        value_term = value_term.unflatten(-1, (-1, self.head_dim))
        return key + key_term.transpose(1, 2), value + value_term.transpose(1, 2)


def _rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE, in the layout `(..., heads, head_dim)`: dimensions `i` and `i + head_dim / 2` are a plane."""
    cos, sin = rotary
    half = states.shape[-1] // 2
    first, second = states.split(half, dim=-1)
    # In place, halves on their own: a third of the time of `states * cos + rotate_half(states) * sin`, and no less exact.
    rotated = states * cos
    rotated[..., :half].addcmul_(second, sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(first, sin[..., half:])
    return rotated


def lend_parts(language_layer: nn.Module) -> None:
    """
    Lets a decoder layer of the LLM be called around a [`LibraRoutedLayer`], which uses its parts and never its forward.

    Engines act where a module is called: FSDP gathers the weights of a layer before its forward and frees them after it,
    an offloaded layer is fetched and put back. So the LLM's layer is called, and runs the routed layer. Called as the LLM
    calls it, it does what it always did.

    Args:
        language_layer (`nn.Module`):
            Changed in place: `language_layer(..., routed_layer=layer)` runs `layer(..., language_layer)` and returns
            `(None, language, vision)`. What comes first from a layer of the LLM is recorded as a hidden state of the LLM
            alone; [`LibraSequence`] records Libra's.
    """
    language_layer.forward = functools.partial(_lend, language_layer)  # type: ignore[method-assign]


def _lend(language_layer, *args, routed_layer=None, **kwargs):
    if routed_layer is None:
        return type(language_layer).forward(language_layer, *args, **kwargs)
    return None, *routed_layer(*args, language_layer=language_layer, **kwargs)


class LibraRoutedLayer(GradientCheckpointingLayer):
    """
    One decoder layer. It owns the vision half (norms, expert, bridge) and runs the LLM's layer as the language half:
    language rows meet the LLM's parameters only, vision rows the expert's only, and they meet in attention. Without an
    expert (`use_expert=False`) vision rows meet the LLM's, too.
    """

    def __init__(self, config: LibraConfig, layer_idx: int):
        super().__init__()
        hidden, eps = config.text_config.hidden_size, config.text_config.rms_norm_eps
        self.use_expert = config.use_expert
        if config.use_expert:
            self.input_layernorm = LibraRMSNorm(hidden, eps=eps)
        self.self_attn = LibraRoutedAttention(config, layer_idx)
        if config.use_expert:
            self.post_attention_layernorm = LibraRMSNorm(hidden, eps=eps)
            self.mlp = LibraVisionMLP(config)

    def forward(
        self,
        language: torch.Tensor,
        vision: torch.Tensor | None,
        routing: Routing | None,
        language_layer: Any,
        only_last: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            language (`torch.Tensor`):
                Language rows, packed: `(language rows, hidden)`. Without routing `(batch, length, hidden)`.
            vision (`torch.Tensor` of shape `(vision rows, hidden)` or `None`):
                Vision rows, packed. Without routing `None`, or no rows in training.
            routing ([`Routing`] or `None`): `None` when every row is language.
            language_layer (`nn.Module`): the LLM's decoder layer, in whose call this one runs: see [`lend_parts`].
            only_last (`bool`, *optional*, defaults to `False`):
                With a routing, whether only the last token of each row goes on: what a prefill needs of the last layer.
            kwargs: passed on to [`LibraRoutedAttention`].

        Returns:
            `tuple`: language and vision rows, as they came or, with `only_last`, as in `routing.last`.
        """
        vision_layer = self if self.use_expert else language_layer
        (language_update, vision_update), _ = self.self_attn(
            language_layer.input_layernorm(language),
            None if vision is None else vision_layer.input_layernorm(vision),
            language_attention=language_layer.self_attn,
            vision_attention=vision_layer.self_attn,
            routing=routing,
            only_last=only_last,
            **kwargs,
        )
        if only_last and routing is not None and vision is not None:
            language, vision = routing.select_last(language, vision)
        language = language + language_update
        language = language + language_layer.mlp(language_layer.post_attention_layernorm(language))
        if vision is not None:
            vision = vision + vision_update
            vision = vision + vision_layer.mlp(vision_layer.post_attention_layernorm(vision))
        return language, vision


class LibraSequence(nn.Module):
    """Puts the streams back into the sequence. A module, so that the hidden states that pass through can be recorded."""

    def forward(self, language: torch.Tensor, vision: torch.Tensor | None, routing: Routing | None) -> torch.Tensor:
        """From the rows of both streams to `(batch, length, hidden)`, zeros at padding."""
        if vision is None:
            return language
        if routing is None:
            return language + vision.sum()  # of no rows: 0, and in the graph
        return routing.unpack(language, vision)


class LibraHybridEmbedding(nn.Module):
    """
    The hybrid image token (Section 3.2): `x = W RMSNorm([E_d; E_c])`, where `E_d` concatenates the embeddings of a
    patch's discrete codes and `E_c` is its continuous CLIP feature (zeros for BOI, EOI and images to be generated).
    With `use_continuous_features=False` it is `x = E_d`.
    """

    def __init__(self, config: LibraConfig):
        super().__init__()
        self.config = config
        hidden = config.text_config.hidden_size
        self.embed_tokens = nn.ModuleList(
            nn.Embedding(config.codebook_size + 2, hidden // config.num_codebooks) for _ in range(config.num_codebooks)
        )
        if config.use_continuous_features:
            self.norm = LibraRMSNorm(hidden + config.feature_size, eps=config.text_config.rms_norm_eps)
            self.proj = nn.Linear(hidden + config.feature_size, hidden, bias=False)

    def forward(
        self, vision_ids: torch.Tensor, featured: torch.Tensor | None, features: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Args:
            vision_ids (`torch.LongTensor` of shape `(vision tokens,)`): flat ids of codes, BOI, EOI.
            featured (`torch.BoolTensor` of shape `(vision tokens,)`, *optional*): the tokens that have features.
            features (`torch.Tensor` of shape `(images, patches, feature_size)`, *optional*): for these, in order.

        Returns:
            `torch.Tensor` of shape `(vision tokens, hidden)`.

        Raises:
            ValueError: if there are more features than tokens, because the attention mask hides some of an image.
        """
        entries = codebook_entries(vision_ids, self.config)  # (tokens, codebooks)
        discrete = torch.cat([table(entries[:, k]) for k, table in enumerate(self.embed_tokens)], dim=-1)
        if not self.config.use_continuous_features:
            return discrete
        hybrid = nn.functional.pad(discrete, (0, self.config.feature_size))  # (tokens, hidden + feature_size)
        if features is not None and featured is not None:
            places = featured.nonzero().squeeze(1)
            if len(places) != features.shape[0] * features.shape[1]:
                raise ValueError(
                    f"image_features holds {features.shape[0] * features.shape[1]} patches, but attention_mask leaves "
                    f"{len(places)} image tokens of whole images. It must be 1 on all tokens of these images."
                )
            continuous = hybrid[:, discrete.shape[1] :]
            continuous.index_copy_(0, places, features.to(hybrid).flatten(0, 1))
        return self.proj(self.norm(hybrid)).to(discrete.dtype)  # under autocast the stream stays in float32
