"""PyTorch Libra: a decoupled vision system on a large language model (Xu et al., ICML 2024).

Where the paper's parts are:

| paper | here |
|---|---|
| hybrid image tokens (3.2) | [`LibraHybridEmbedding`] |
| routed visual expert (3.3) | [`LowRankLinear`], [`LibraRoutedLayer`], [`LibraVisionMLP`] |
| cross-modal bridge (3.3) | [`LibraRoutedAttention`] |
| vision heads, unified loss (3.4) | [`LibraForCausalLM`] |

The language model is built from its own configuration and keeps its own parameter names under
`model.language_model` (and `lm_head`); everything visual is under `model.vision_model` and `vision_lm_head`. A token's
modality is read from its id and from nothing else.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_libra import LibraConfig
from .generation_libra import LibraGenerationMixin, joint_code_logits
from .image_blocks_libra import check_image_blocks, check_image_features, codebook_entries, find_image_blocks
from .loss_libra import libra_loss
from .routing_libra import LowRankLinear, Routing, plan_routing, route


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
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LibraRoutedAttention(nn.Module):
    """
    Attention over both modalities, with the visual expert's projections and the cross-modal bridge.

    With K the plain keys, a query sees `K_j` when its modality is that of token j and `K_j + bridge_K(x_j)` when it is
    not; values likewise. So keys and values have two views, and every query attends to one of them:

    - the language view: text rows plain, vision rows bridged;
    - the vision view: vision rows plain, text rows bridged.

    The two views are kept side by side in the cache, as twice the key/value heads.
    """

    def __init__(self, config: LibraConfig, layer_idx: int):
        super().__init__()
        text = config.text_config
        self.layer_idx = layer_idx
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        query_size = text.num_attention_heads * self.head_dim
        key_size = text.num_key_value_heads * self.head_dim
        ratio = config.expert_down_ratio
        self.q_proj = LowRankLinear(text.hidden_size, query_size, query_size // ratio)
        self.k_proj = LowRankLinear(text.hidden_size, key_size, key_size // ratio)
        self.v_proj = LowRankLinear(text.hidden_size, key_size, key_size // ratio)
        self.o_proj = LowRankLinear(query_size, text.hidden_size, text.hidden_size // ratio)
        self.has_head_norms = text.model_type == "qwen3"
        if self.has_head_norms:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=text.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=text.rms_norm_eps)
        self.use_bridge = config.use_bridge
        if config.use_bridge:
            bridge = (text.hidden_size, key_size, config.bridge_rank, True)
            self.k_bridge_on_vision = LowRankLinear(*bridge)
            self.k_bridge_on_language = LowRankLinear(*bridge)
            self.v_bridge_on_vision = LowRankLinear(*bridge)
            self.v_bridge_on_language = LowRankLinear(*bridge)

    def forward(
        self,
        hidden_states: torch.Tensor,
        language_attention: Any,
        routing: Routing | None,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): normed rows of both modalities.
            language_attention (`nn.Module`): the LLM's attention of the same layer.
            routing ([`Routing`] or `None`): `None` when every row is language.
            attention_mask (`torch.Tensor` or `None`): as transformers' attention functions take it.
            position_embeddings (`tuple` of two `torch.Tensor` of shape `(batch, length, head_dim)`): cos, sin.
            past_key_values (`Cache`, *optional*): holds both views.

        Returns:
            `tuple`: the output `(batch, length, hidden)`, and the attention weights `(batch, heads, length, keys)`
            when the attention function gives them.
        """
        query, key, value = self._project(hidden_states, language_attention, routing)
        key, value = self._views(hidden_states, routing, key, value, past_key_values is not None)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self._attend(language_attention, routing, query, key, value, attention_mask, **kwargs)
        output = output.flatten(2)  # (batch, length, heads * head_dim)
        return route(output, routing, language_attention.o_proj, self.o_proj), weights

    def _project(self, hidden_states, language_attention, routing):
        """Queries, plain keys, values: `(batch, heads, length, head_dim)` each."""
        states = []
        for name in ("q", "k", "v"):
            language_proj, vision_proj = getattr(language_attention, f"{name}_proj"), getattr(self, f"{name}_proj")
            state = route(hidden_states, routing, language_proj, vision_proj)
            state = state.unflatten(-1, (-1, self.head_dim))  # (batch, length, heads, head_dim)
            if self.has_head_norms and name != "v":
                language_norm, vision_norm = getattr(language_attention, f"{name}_norm"), getattr(self, f"{name}_norm")
                state = route(state, routing, language_norm, vision_norm)
            states.append(state.transpose(1, 2))
        return states

    def _views(self, hidden_states, routing, key, value, cached):
        """Keys and values of the language view followed, on the heads, by those of the vision view."""
        only_language_reads = routing is None and not cached
        if not self.use_bridge or only_language_reads:
            return key, value
        views = []
        for state, name in ((key, "k"), (value, "v")):
            on_language = getattr(self, f"{name}_bridge_on_language")
            on_vision = getattr(self, f"{name}_bridge_on_vision")
            bridge = route(hidden_states, routing, on_language, on_vision)
            bridged = state + bridge.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            if routing is None:
                views.append(torch.cat([state, bridged], dim=1))
            else:
                is_vision = routing.is_vision[:, None, :, None]
                language_view = torch.where(is_vision, bridged, state)
                vision_view = torch.where(is_vision, state, bridged)
                views.append(torch.cat([language_view, vision_view], dim=1))  # (batch, 2 * kv heads, length, head_dim)
        return views

    def _attend(self, language_attention, routing, query, key, value, attention_mask, **kwargs):
        """Each query over its own view: `(batch, length, heads, head_dim)`, and the weights."""
        config = language_attention.config
        heads, key_heads = query.shape[1], query.shape[1] // language_attention.num_key_value_groups
        has_two_views = key.shape[1] == 2 * key_heads
        if has_two_views and routing is None:
            key, value = key[:, :key_heads], value[:, :key_heads]
        elif has_two_views:
            query = torch.cat([query, query], dim=1)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            language_attention,
            query,
            key,
            value,
            attention_mask,
            dropout=language_attention.attention_dropout if self.training else 0.0,
            scaling=language_attention.scaling,
            sliding_window=getattr(language_attention, "sliding_window", getattr(config, "sliding_window", None)),
            **kwargs,
        )
        if has_two_views and routing is not None:
            is_vision = routing.is_vision[:, :, None, None]
            output = torch.where(is_vision, output[:, :, heads:], output[:, :, :heads])
            if weights is not None:
                weights = torch.where(is_vision.transpose(1, 2), weights[:, heads:], weights[:, :heads])
        return output, weights


class LibraRoutedLayer(GradientCheckpointingLayer):
    """
    One decoder layer. It owns the vision half (norms, expert, bridge) and runs the LLM's layer as the language half:
    language rows meet the LLM's parameters only, vision rows the expert's only, and they meet in attention.
    """

    def __init__(self, config: LibraConfig, layer_idx: int):
        super().__init__()
        hidden, eps = config.text_config.hidden_size, config.text_config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(hidden, eps=eps)
        self.self_attn = LibraRoutedAttention(config, layer_idx)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps=eps)
        self.mlp = LibraVisionMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, language_layer: Any, routing: Routing | None, **kwargs
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): rows of both modalities.
            language_layer (`nn.Module`): the LLM's decoder layer.
            routing ([`Routing`] or `None`): `None` when every row is language.
            kwargs: passed on to [`LibraRoutedAttention`].

        Returns:
            `torch.Tensor` of shape `(batch, length, hidden)`.
        """
        residual = hidden_states
        hidden_states = route(hidden_states, routing, language_layer.input_layernorm, self.input_layernorm)
        hidden_states, _ = self.self_attn(hidden_states, language_layer.self_attn, routing, **kwargs)
        hidden_states = residual + hidden_states

        residual = hidden_states
        norms = language_layer.post_attention_layernorm, self.post_attention_layernorm
        hidden_states = route(hidden_states, routing, *norms)
        hidden_states = route(hidden_states, routing, language_layer.mlp, self.mlp)
        return residual + hidden_states


class LibraHybridEmbedding(nn.Module):
    """
    The hybrid image token (Section 3.2): `x = W RMSNorm([E_d; E_c])`, where `E_d` concatenates the embeddings of a
    patch's discrete codes and `E_c` is its continuous CLIP feature (zeros for BOI, EOI and images to be generated).
    """

    def __init__(self, config: LibraConfig):
        super().__init__()
        self.config = config
        hidden = config.text_config.hidden_size
        self.embed_tokens = nn.ModuleList(
            nn.Embedding(config.codebook_size + 2, hidden // config.num_codebooks) for _ in range(config.num_codebooks)
        )
        self.norm = LlamaRMSNorm(hidden + config.feature_size, eps=config.text_config.rms_norm_eps)
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
        """
        entries = codebook_entries(vision_ids, self.config)  # (tokens, codebooks)
        discrete = torch.cat([table(entries[:, k]) for k, table in enumerate(self.embed_tokens)], dim=-1)
        continuous = discrete.new_zeros(len(vision_ids), self.config.feature_size)  # (tokens, feature_size)
        if features is not None and featured is not None:
            places = featured.nonzero().squeeze(1)
            continuous = continuous.index_copy(0, places, features.to(continuous).flatten(0, 1))
        return self.proj(self.norm(torch.cat([discrete, continuous], dim=-1)))


class LibraVisionModel(nn.Module):
    """Everything visual of the decoder: hybrid embedding, the vision half of each layer, the final vision norm."""

    def __init__(self, config: LibraConfig):
        super().__init__()
        self.embedding = LibraHybridEmbedding(config)
        self.layers = nn.ModuleList(LibraRoutedLayer(config, i) for i in range(config.text_config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.text_config.hidden_size, eps=config.text_config.rms_norm_eps)


class LibraPreTrainedModel(PreTrainedModel):
    """Base of the Libra models: initialisation, and what transformers may do with them."""

    config_class = LibraConfig
    config: LibraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LibraRoutedLayer", "LibraHybridEmbedding"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LibraRoutedLayer, "attentions": LibraRoutedAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "low_rank_std"):  # the two halves of a LowRankLinear
            init.normal_(module.weight, std=module.low_rank_std)
        elif hasattr(module, "low_rank_gain"):
            init.normal_(module.weight, std=module.low_rank_gain * self.config.text_config.initializer_range)


class LibraModel(LibraPreTrainedModel):
    """
    The routed decoder without heads.

    Args:
        config ([`LibraConfig`]): the model's configuration.
    """

    def __init__(self, config: LibraConfig):
        super().__init__(config)
        # Both halves in the dtype this model is built in, whatever dtype the LLM's own configuration was saved with.
        self.language_model = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        self.vision_model = LibraVisionModel(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's text embeddings."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        """Replaces the LLM's text embeddings."""
        self.language_model.embed_tokens = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        image_features: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Flat ids: text in `[0, V)`, image codes, BOI, EOI (see [`LibraConfig`]).
            attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*): 0 on padding.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): image tokens count like text.
            past_key_values (`Cache`, *optional*): any cache of transformers; it holds both views.
            image_features (`torch.FloatTensor` of shape `(images, patches, feature_size)`, *optional*):
                CLIP features of the whole images of `input_ids`, in reading order over the batch. Absent: zeros.
            use_cache (`bool`, *optional*): whether to return `past_key_values`.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` of shape `(batch, length, hidden)`, after the final norm of
            each token's modality.

        Raises:
            ValueError: for ids out of range, broken image blocks, or features that do not fit them.
        """
        if input_ids is None:
            raise ValueError("LibraModel needs input_ids: a token's modality is read from its id.")
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + past_length

        is_vision = input_ids >= self.config.text_vocab_size
        # In training the vision parameters take part in the graph even for a text-only batch: DDP waits for them.
        routing = plan_routing(is_vision) if self.training or is_vision.any() else None
        hidden_states = self._embed(input_ids, image_features, routing, continues=past_length > 0)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_masks_for_generate(
                self.config, hidden_states, attention_mask, past_key_values, position_ids=position_ids
            )
        position_embeddings = self.language_model.rotary_emb(hidden_states, position_ids)

        layer_types: Any = getattr(self.config.text_config, "layer_types", None)
        for i, layer in enumerate(self.vision_model.layers):
            hidden_states = layer(
                hidden_states,
                self.language_model.layers[i],
                routing,
                attention_mask=masks[layer_types[i]] if isinstance(masks, dict) else masks,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        hidden_states = route(hidden_states, routing, self.language_model.norm, self.vision_model.norm)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None
        )

    def _embed(self, input_ids, image_features, routing, continues):
        """Text embeddings and hybrid image tokens, in place: `(batch, length, hidden)`."""
        is_decoding_step = continues and input_ids.shape[1] == 1 and image_features is None
        if not is_decoding_step:  # ids of a decoding step were sampled from our own logits; spare it the checks
            check_image_blocks(input_ids, self.config, continues)
        if routing is None:
            if image_features is not None:
                check_image_features(image_features, find_image_blocks(input_ids, self.config), self.config)
            return self.language_model.embed_tokens(input_ids)
        featured = None
        if image_features is not None:
            blocks = find_image_blocks(input_ids, self.config)
            check_image_features(image_features, blocks, self.config)
            featured = blocks.featured.flatten()[routing.vision_rows]
        return route(
            input_ids[..., None],
            routing,
            lambda ids: self.language_model.embed_tokens(ids.squeeze(-1)),
            lambda ids: self.vision_model.embedding(ids.squeeze(-1), featured, image_features),
        )


@dataclass
class LibraCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`LibraForCausalLM`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, with labels):
            Cross entropy averaged over all supervised tokens of both modalities together.
        text_loss, vision_loss (`torch.FloatTensor` of shape `()`, *optional*, with labels):
            The same over the text targets and over the vision targets alone (0 where there is none).
        logits (`torch.FloatTensor` of shape `(batch, kept rows, V)`, *optional*):
            Of the language head, `-inf` on rows of vision tokens. None in training with labels. In a generation step
            (`logits_to_keep=1`) whose last row is a vision token: `(batch, 1, V + codes + 2)` over the flat ids.
        vision_logits (`torch.FloatTensor` of shape `(vision rows, num_codebooks, codebook_size + 2)`, *optional*):
            Of the vision heads, for the kept vision rows in reading order. None where there is no such row.
        past_key_values (`Cache`, *optional*): the cache.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`, *optional*): as in transformers.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    vision_logits: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    vision_loss: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class LibraForCausalLM(LibraPreTrainedModel, LibraGenerationMixin, GenerationMixin):
    """
    Libra with its heads: the LLM's on language rows, one per codebook on vision rows. Reads and writes text and images.

    Args:
        config ([`LibraConfig`]): the model's configuration.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor

    >>> model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    >>> inputs = processor(images=image, return_tensors="pt")
    >>> processor.batch_decode(model.generate(**inputs, max_new_tokens=30), skip_special_tokens=True)
    ```"""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LibraConfig):
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.model = LibraModel(config)
        self.lm_head = nn.Linear(hidden, config.text_vocab_size, bias=False)
        self.vision_lm_head = nn.ModuleList(
            nn.Linear(hidden, config.codebook_size + 2, bias=False) for _ in range(config.num_codebooks)
        )
        self.post_init()

    @property
    def pipeline_class(self) -> type:
        """The image-to-text pipeline, for `pipeline("image-to-text", model=model, pipeline_class=...)`."""
        from .pipeline_libra import LibraImageToTextPipeline

        return LibraImageToTextPipeline

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        image_features: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> LibraCausalLMOutputWithPast:
        r"""
        Args:
            input_ids, attention_mask, position_ids, past_key_values, image_features, use_cache:
                As in [`LibraModel.forward`].
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Flat ids like `input_ids`, -100 where nothing is supervised. BOI, padding, and the newline after an
                image are never supervised (see [`libra_loss`]).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many last rows, or which rows, get logits; 0 is all.
            num_items_in_batch (`int`, *optional*):
                Divides the summed loss instead of the number of supervised tokens; the Trainer passes it when it
                accumulates gradients.

        Returns:
            [`LibraCausalLMOutputWithPast`]

        Raises:
            ValueError: for wrong input (see [`LibraModel.forward`]) and labels that no head can predict.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            image_features=image_features,
            use_cache=use_cache,
            **kwargs,
        )
        assert input_ids is not None  # the base model has refused None
        hidden_states = outputs.last_hidden_state
        losses: dict[str, Any] = {}
        if labels is not None:
            losses = libra_loss(
                hidden_states, input_ids, labels, attention_mask, self.lm_head, self.predict_codes, self.config,
                num_items_in_batch,
            )  # fmt: skip
        logits = vision_logits = None
        if labels is None or not self.training:  # training needs no logits but those of supervised rows
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            kept_ids = input_ids[:, kept]
            logits, vision_logits = self._predict(hidden_states[:, kept], kept_ids)
            if isinstance(logits_to_keep, int) and logits_to_keep == 1 and vision_logits is not None:
                logits = self._flat_logits(logits, vision_logits, kept_ids)
        return LibraCausalLMOutputWithPast(
            **losses,
            logits=logits,
            vision_logits=vision_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def predict_codes(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        The vision heads (Section 3.4).

        Args:
            hidden_states (`torch.Tensor` of shape `(rows, hidden)`): normed vision rows.

        Returns:
            `torch.Tensor` of shape `(rows, num_codebooks, codebook_size + 2)`.
        """
        return torch.stack([head(hidden_states) for head in self.vision_lm_head], dim=1)

    def _predict(self, hidden_states, ids):
        """Logits of each head on the rows of its modality: `(batch, rows, V)` and `(vision rows, codebooks, size + 2)`."""
        is_vision = ids >= self.config.text_vocab_size
        if not is_vision.any():
            return self.lm_head(hidden_states), None
        routing = plan_routing(is_vision)
        rows = hidden_states.flatten(0, 1)
        text = self.lm_head(rows.index_select(0, routing.language_rows))
        logits = text.new_full((len(rows), self.config.text_vocab_size), float("-inf"))
        logits = logits.index_copy(0, routing.language_rows, text).unflatten(0, ids.shape)
        return logits, self.predict_codes(rows.index_select(0, routing.vision_rows))

    def _flat_logits(self, logits, vision_logits, ids):
        """Logits of one step over the flat ids, `(batch, 1, V + codes + 2)`; text rows cannot write vision, nor back."""
        # In float32: sums of log-probabilities of about -12 have few distinct values in bfloat16, and codes would tie.
        flat = logits.new_full((*logits.shape[:2], self.config.total_vocab_size), float("-inf"), dtype=torch.float32)
        flat[..., : self.config.text_vocab_size] = logits
        is_vision = ids >= self.config.text_vocab_size
        flat[..., self.config.text_vocab_size :][is_vision] = joint_code_logits(vision_logits.float(), self.config)
        return flat


__all__ = ["LibraForCausalLM", "LibraModel", "LibraPreTrainedModel"]
