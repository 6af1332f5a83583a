"""PyTorch Libra: a decoupled vision system on a large language model (Xu et al., ICML 2024).

Where the paper's parts are:

| paper | here |
|---|---|
| hybrid image tokens (3.2), visual expert and cross-modal bridge (3.3) | `layers_libra.py` |
| vision heads, unified loss (3.4) | [`LibraForCausalLM`] |
| attention on images (Figures 4, 7) | `attention_maps_libra.py` |

The language model is built from its own configuration and keeps its own parameter names under
`model.language_model` (and `lm_head`); everything visual is under `model.vision_model` and `vision_lm_head`. A token's
modality is read from its id and from nothing else.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_maps_libra import LibraAttentionMapsMixin
from .cache_libra import CACHE_NAME, BridgeMemory, one_cache
from .configuration_libra import LibraConfig
from .generation_libra import LibraGenerationMixin, joint_code_logits
from .image_blocks_libra import check_ids, check_image_blocks, check_image_features, find_image_blocks
from .layers_libra import (
    LibraHybridEmbedding,
    LibraRMSNorm,
    LibraRoutedAttention,
    LibraRoutedLayer,
    LibraSequence,
    lend_parts,
)
from .loss_libra import libra_loss
from .routing_libra import packed_starts, plan_routing


class LibraVisionModel(nn.Module):
    """Everything visual of the decoder: hybrid embedding, the vision half of each layer, the final vision norm."""

    def __init__(self, config: LibraConfig):
        super().__init__()
        self.embedding = LibraHybridEmbedding(config)
        self.layers = nn.ModuleList(LibraRoutedLayer(config, i) for i in range(config.text_config.num_hidden_layers))
        self.norm = LibraRMSNorm(config.text_config.hidden_size, eps=config.text_config.rms_norm_eps)
        self.sequence = LibraSequence()


RECORDED = ("hidden_states", "attentions")


class LibraPreTrainedModel(PreTrainedModel):
    """Base of the Libra models: initialisation, and what transformers may do with them."""

    config_class = LibraConfig
    config: LibraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LibraRoutedLayer", "LibraHybridEmbedding"]
    # What a layer gets that stays where it is; layers are modules with hooks of their own, or on disk.
    _skip_keys_device_placement = [
        "cache",
        "past_key_values",
        "memory",
        "routed_layer",
        "language_layer",
        "language_attention",
        "vision_attention",
    ]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # of text decoding
    _can_record_outputs = {
        "hidden_states": OutputRecorder(LibraSequence, capture_initial_hidden_state=False),
        "attentions": LibraRoutedAttention,
    }

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
        for layer in self.language_model.layers:
            lend_parts(layer)
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
        only_last: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Flat ids: text in `[0, V)`, image codes, BOI, EOI (see [`LibraConfig`]).
            attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*): 0 on padding.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): image tokens count like text.
            cache, past_key_values (`Cache`, *optional*):
                Any cache of transformers (see [`BridgeMemory`]), under its name of today or of before transformers 5.24.
            image_features (`torch.FloatTensor` of shape `(images, patches, feature_size)`, *optional*):
                CLIP features of the whole images of `input_ids`, in reading order over the batch. Absent: zeros.
            use_cache (`bool`, *optional*): whether to return the cache.
            only_last (`bool`, *optional*, defaults to `False`):
                Whether `last_hidden_state` may hold the last token of each row only. With images the last layer then
                computes no more than that, and keys and values of the rest.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` of shape `(batch, length, hidden)`, or with `only_last` `(batch,
            1, hidden)`, after the final norm of each token's modality.

        Raises:
            ValueError: for ids out of range, broken image blocks, or features that do not fit them.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("LibraModel needs input_ids, not inputs_embeds: a token's modality is read from its id.")
        if kwargs.get("pixel_values") is not None:
            raise ValueError(
                "LibraModel reads image_features, not pixel_values: turn the batch of the processor into codes and "
                "features with processor.tokenize_images(batch)."
            )
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past_length = cache.get_seq_length() if cache is not None else 0
        if not torch.compiler.is_compiling():
            past_length = int(past_length)  # static caches count in a tensor
        starts = None
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + past_length
        elif attention_mask is None and cache is None:
            starts = packed_starts(position_ids)

        memory = None
        if cache is not None and self.config.use_bridge:
            memory = BridgeMemory(cache, self._layer_types)
        is_vision = input_ids >= self.config.text_vocab_size
        routing, masks = None, attention_mask
        if self._needs_routing(input_ids, is_vision):
            routing = plan_routing(is_vision, attention_mask, past_length, starts, only_last)
        open_tokens = None
        if memory is not None and input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
            open_tokens = memory.open_tokens(self.config.num_patches)
        language, vision = self._embed(input_ids, image_features, routing, past_length, open_tokens)
        if memory is not None:  # after the last check: wrong input leaves the cache as it was
            memory.remember_tokens(position_ids, is_vision)
        if routing is None and not isinstance(attention_mask, dict):
            masks = create_masks_for_generate(self.config, language, attention_mask, cache, position_ids=position_ids)
        position_embeddings = self._rotary(language, position_ids, routing, memory)

        records = kwargs.get("output_hidden_states") or getattr(self.config, "output_hidden_states", False)
        for i, layer in enumerate(self.vision_model.layers):
            is_last = layer is self.vision_model.layers[-1]
            if records:
                self.vision_model.sequence(language, vision, routing)
            _, language, vision = self.language_model.layers[i](
                language,
                vision,
                routing,
                routed_layer=layer,
                attention_mask=masks[self._layer_types[i]] if isinstance(masks, dict) else masks,
                position_embeddings=position_embeddings,
                cache=cache,
                memory=memory,
                only_last=only_last and is_last,
                **kwargs,
            )
        if only_last and routing is None:
            language = language[:, -1:]
        elif only_last:
            routing = routing.last
        language = self.language_model.norm(language)
        vision = None if vision is None else self.vision_model.norm(vision)
        return BaseModelOutputWithPast(
            last_hidden_state=self.vision_model.sequence(language, vision, routing),
            **{CACHE_NAME: cache if use_cache else None},
        )

    @property
    def _layer_types(self) -> list[str]:
        layer_types = getattr(self.config.text_config, "layer_types", None)
        return layer_types or ["attention"] * self.config.text_config.num_hidden_layers

    def _needs_routing(self, input_ids, is_vision):
        if torch.compiler.is_compiling():
            # Looking would break the graph. What is compiled is text decoding; image tokens in it are an error.
            torch._assert_async(~is_vision.any(), "A compiled Libra decodes text only; run images uncompiled.")
            return False
        if input_ids.numel() == 0:
            return False  # refused with the image blocks
        lowest, highest = torch.stack(input_ids.aminmax()).tolist()  # one look at the device a step
        if lowest < 0 or highest >= self.config.total_vocab_size:
            check_ids(input_ids, self.config)
        return highest >= self.config.text_vocab_size

    def _embed(self, input_ids, image_features, routing, past_length, open_tokens):
        """
        Text embeddings and hybrid image tokens: `(language rows, hidden)` and `(vision rows, hidden)`, or without routing
        `(batch, length, hidden)` and `None`.
        """
        blocks = None
        if not torch.compiler.is_compiling():
            blocks = self._check(input_ids, image_features, past_length > 0, open_tokens)
        if routing is None:
            # In training the vision parameters take part in the graph with no rows: DDP waits for them.
            vision = self.vision_model.embedding(input_ids.new_empty(0), None, None) if self.training else None
            return self.language_model.embed_tokens(input_ids), vision
        featured = None if blocks is None else routing.vision.select(blocks.featured)
        language_ids, vision_ids = routing.language.select(input_ids), routing.vision.select(input_ids)
        vision = self.vision_model.embedding(vision_ids, featured, image_features)
        return self.language_model.embed_tokens(language_ids), vision

    def _check(self, input_ids, image_features, continues, open_tokens):
        """Refuses broken image blocks and features that do not fit them; returns the blocks if there are features."""
        if continues and input_ids.shape[1] == 1 and image_features is None:
            return None  # a decoding step: ids were sampled from our own logits; spare it the checks
        check_image_blocks(input_ids, self.config, continues, open_tokens)
        if image_features is None:
            return None
        blocks = find_image_blocks(input_ids, self.config)
        check_image_features(image_features, blocks, self.config)
        return blocks

    def _rotary(self, states, position_ids, routing, memory):
        """
        cos and sin of RoPE, `(batch or 1, length, head_dim)` each. With routing a pair for the rows of each stream, `(rows,
        1, head_dim)` each, and those of all cached keys go to the memory.
        """
        cos, sin = self.language_model.rotary_emb(states, position_ids)  # (batch or 1, length, head_dim)
        if routing is None:
            return cos, sin
        if memory is not None and routing.total_length > routing.shape[1]:
            for kind in memory.tokens:
                memory.rotary[kind] = self.language_model.rotary_emb(states, memory.positions(kind))
        streams = routing.language, routing.vision
        return [(stream.select(cos).unsqueeze(1), stream.select(sin).unsqueeze(1)) for stream in streams]


@dataclass
class LibraCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`LibraForCausalLM`]: that of transformers, and what is visual.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, with labels):
            Cross entropy averaged over all supervised tokens of both modalities together.
        text_loss, vision_loss (`torch.FloatTensor` of shape `()`, *optional*, with labels):
            The same over the text targets and over the vision targets alone (0 where there is none).
        codebook_losses (`torch.FloatTensor` of shape `(num_codebooks,)`, *optional*, with labels):
            The terms of each codebook; `vision_loss` is their mean.
        logits (`torch.FloatTensor` of shape `(batch, kept rows, V)`, *optional*):
            Of the language head, `-inf` on rows of vision tokens. None in training with labels. In a generation step
            (`logits_to_keep=1`) whose last row is a vision token: `(batch, 1, V + codes + 2)` over the flat ids.
        vision_logits (`torch.FloatTensor` of shape `(vision rows, num_codebooks, codebook_size + 2)`, *optional*):
            Of the vision heads, for the kept vision rows in reading order. None where there is no such row.
        cache (`Cache`, *optional*): the cache; its name before transformers 5.24, `past_key_values`, reads it too.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`, *optional*): as in transformers.
    """

    vision_logits: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    vision_loss: torch.FloatTensor | None = None
    codebook_losses: torch.FloatTensor | None = None


class LibraForCausalLM(LibraAttentionMapsMixin, LibraGenerationMixin, LibraPreTrainedModel, GenerationMixin):
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
        cache: Cache | None = None,
        **kwargs,
    ) -> LibraCausalLMOutputWithPast:
        r"""
        Args:
            input_ids, attention_mask, position_ids, cache, past_key_values, image_features, use_cache:
                As in [`LibraModel.forward`].
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Flat ids like `input_ids`, -100 where nothing is supervised. BOI, padding, and the newline after an
                image are never supervised (see [`libra_loss`]).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many last rows, or which rows, get logits; 0 is all.
            num_items_in_batch (`int`, *optional*):
                Divides the summed loss instead of the number of supervised tokens; the Trainer passes how many labels
                are not -100, so those that are never supervised should be -100, as the collators of training/ make them.

        Returns:
            [`LibraCausalLMOutputWithPast`]

        Raises:
            ValueError: for wrong input (see [`LibraModel.forward`]) and labels that no head can predict.
        """
        if labels is not None and use_cache is None and one_cache(cache, past_key_values) is None:
            use_cache = False  # nothing follows; and sequences are packed only where no cache goes on
        records = any(kwargs.get(f"output_{kind}", getattr(self.config, f"output_{kind}", False)) for kind in RECORDED)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            image_features=image_features,
            use_cache=use_cache,
            only_last=isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None and not records,
            **kwargs,
        )
        assert input_ids is not None  # the base model has refused None
        hidden_states = outputs.last_hidden_state
        losses: dict[str, Any] = {}
        if labels is not None:
            may_pack = attention_mask is None and one_cache(cache, past_key_values) is None
            losses = libra_loss(
                hidden_states, input_ids, labels, attention_mask, self.lm_head, self.predict_codes, self.config,
                num_items_in_batch, position_ids if may_pack else None,
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
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def save_vision_system(self, folder: str | os.PathLike, base_llm: str | os.PathLike, **kwargs) -> None:
        """Saves the vision system without the language model: see [`~vision_system_libra.save_vision_system`]."""
        from .vision_system_libra import save_vision_system

        save_vision_system(self, folder, base_llm, **kwargs)

    def load_vision_system(self, vision_system: str | os.PathLike) -> None:
        """Puts a saved vision system in place of this one: see [`~vision_system_libra.replace_vision_system`]."""
        from .vision_system_libra import replace_vision_system

        replace_vision_system(self, vision_system)

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
        is_vision = (ids >= self.config.text_vocab_size).flatten()
        if torch.compiler.is_compiling() or not is_vision.any():  # what is compiled is text decoding
            return self.lm_head(hidden_states), None
        rows = hidden_states.flatten(0, 1)
        text_rows, vision_rows = (~is_vision).nonzero().squeeze(1), is_vision.nonzero().squeeze(1)
        text = self.lm_head(rows.index_select(0, text_rows))
        logits = text.new_full((len(rows), self.config.text_vocab_size), float("-inf"))
        logits = logits.index_copy(0, text_rows, text).unflatten(0, ids.shape)
        return logits, self.predict_codes(rows.index_select(0, vision_rows))

    def _flat_logits(self, logits, vision_logits, ids):
        """Logits of one step over the flat ids, `(batch, 1, V + codes + 2)`; text rows cannot write vision, nor back."""
        # In float32: sums of log-probabilities of about -12 have few distinct values in bfloat16, and codes would tie.
        flat = logits.new_full((*logits.shape[:2], self.config.total_vocab_size), float("-inf"), dtype=torch.float32)
        flat[..., : self.config.text_vocab_size] = logits
        is_vision = ids >= self.config.text_vocab_size
        flat[..., self.config.text_vocab_size :][is_vision] = joint_code_logits(vision_logits.float(), self.config)
        return flat


__all__ = ["LibraForCausalLM", "LibraModel", "LibraPreTrainedModel"]
