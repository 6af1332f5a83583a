"""The routed forward in the plainest form, with a Libra's own weights: what the two-stream model is measured against.

As the authors' code has it: boolean masks at every norm, projection and MLP; both views of keys and values in full
and in the cache (four tensors a layer); every query attends to both views, and a mask picks the output that counts;
logits of all rows over text and vision entries, for each codebook. Attention runs on sdpa and never sees a mask, which
is kinder than the original.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import rotate_half

from modeling_libra import LibraForCausalLM
from modeling_libra.cache_libra import CACHE_NAME

NaiveCache = list[tuple[torch.Tensor, ...]]
"""A layer's keys and values of the language view, then those of the vision view: `(batch, heads, length, head_dim)`."""


def naive_forward(
    model: LibraForCausalLM,
    input_ids: torch.Tensor,
    image_features: torch.Tensor | None = None,
    cache: NaiveCache | None = None,
) -> tuple[torch.Tensor, NaiveCache]:
    """
    Args:
        model ([`LibraForCausalLM`]): on a Llama, with its bridge.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): flat ids, without padding.
        image_features (`torch.FloatTensor` of shape `(images, patches, feature_size)`, *optional*): of all images.
        cache (`NaiveCache`, *optional*): of the tokens before; then `length` is 1.

    Returns:
        `tuple`: logits `(num_codebooks, batch, length, V + codebook_size + 2)`, `-inf` where a head does not apply, and
        the cache with the new tokens.
    """
    language: Any = model.model.language_model
    vision: Any = model.model.vision_model
    is_vision = input_ids >= model.config.text_vocab_size  # (batch, length)
    hidden = _embed(model, input_ids, is_vision, image_features)
    past = cache[0][0].shape[2] if cache else 0
    positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
    rotary = language.rotary_emb(hidden, positions)
    new_cache = []
    for i, (text_layer, vision_layer) in enumerate(zip(language.layers, vision.layers)):
        normed = _masked(hidden, is_vision, text_layer.input_layernorm, vision_layer.input_layernorm)
        query, views = _project(normed, is_vision, text_layer.self_attn, vision_layer.self_attn, rotary)
        if cache:
            views = [torch.cat(pair, dim=2) for pair in zip(cache[i], views)]  # (batch, heads, past + 1, head_dim)
        new_cache.append(tuple(views))
        attended = _attend_twice(query, views, is_vision)
        hidden = hidden + _masked(attended, is_vision, text_layer.self_attn.o_proj, vision_layer.self_attn.o_proj)
        normed = _masked(hidden, is_vision, text_layer.post_attention_layernorm, vision_layer.post_attention_layernorm)
        hidden = hidden + _masked(normed, is_vision, text_layer.mlp, vision_layer.mlp)
    hidden = _masked(hidden, is_vision, language.norm, vision.norm)
    return _full_logits(model, hidden, is_vision), new_cache


def _masked(rows: torch.Tensor, is_vision: torch.Tensor, language_map: Callable, vision_map: Callable) -> torch.Tensor:
    """Each row through the map of its modality: `(batch, length, out)`."""
    text = language_map(rows[~is_vision])
    output = text.new_empty(*is_vision.shape, text.shape[-1])
    output[~is_vision] = text
    output[is_vision] = vision_map(rows[is_vision])
    return output


def _embed(model, input_ids, is_vision, image_features):
    """Text embeddings and hybrid image tokens: `(batch, length, hidden)`."""
    config, embedding = model.config, model.model.vision_model.embedding
    text = model.model.language_model.embed_tokens(input_ids[~is_vision])
    codes = input_ids[is_vision] - config.text_vocab_size
    markers = codes >= config.num_image_codes  # BOI and EOI: the entries after the codes, in both codebooks
    marker_entries = codes - config.num_image_codes + config.codebook_size
    first = torch.where(markers, marker_entries, codes // config.codebook_size)
    second = torch.where(markers, marker_entries, codes % config.codebook_size)
    discrete = torch.cat([embedding.embed_tokens[0](first), embedding.embed_tokens[1](second)], dim=-1)
    continuous = discrete.new_zeros(len(codes), config.feature_size)  # (vision tokens, feature_size)
    if image_features is not None:
        continuous[~markers] = image_features.flatten(0, 1)
    output = text.new_empty(*input_ids.shape, text.shape[-1])
    output[~is_vision] = text
    output[is_vision] = embedding.proj(embedding.norm(torch.cat([discrete, continuous], dim=-1)))
    return output


def _project(normed, is_vision, text, vision, rotary):
    """Queries, and keys and values of both views: `(batch, heads, length, head_dim)` each."""

    def heads(language_map, vision_map):
        return _masked(normed, is_vision, language_map, vision_map).unflatten(-1, (-1, text.head_dim)).transpose(1, 2)

    def rotated(state):
        cos, sin = (part[:, None] for part in rotary)
        return state * cos + rotate_half(state) * sin

    of_vision = is_vision[:, None, :, None]
    query, key, value = (heads(getattr(text, name), getattr(vision, name)) for name in ("q_proj", "k_proj", "v_proj"))
    bridged_key = key + heads(vision.k_bridge_on_language, vision.k_bridge_on_vision)
    bridged_value = value + heads(vision.v_bridge_on_language, vision.v_bridge_on_vision)
    return rotated(query), [
        rotated(torch.where(of_vision, bridged_key, key)),
        torch.where(of_vision, bridged_value, value),
        rotated(torch.where(of_vision, key, bridged_key)),
        torch.where(of_vision, value, bridged_value),
    ]


def _attend_twice(query: torch.Tensor, views: Sequence[torch.Tensor], is_vision: torch.Tensor) -> torch.Tensor:
    """All queries over both views; each keeps the output of its own: `(batch, length, heads * head_dim)`."""
    causal = query.shape[2] > 1
    language = F.scaled_dot_product_attention(query, views[0], views[1], is_causal=causal)
    vision = F.scaled_dot_product_attention(query, views[2], views[3], is_causal=causal)
    return torch.where(is_vision[:, None, :, None], vision, language).transpose(1, 2).flatten(2)


def _full_logits(model, hidden, is_vision):
    """Every head on the rows of its modality, in one tensor: `(num_codebooks, batch, length, V + codebook_size + 2)`."""
    config = model.config
    width = config.text_vocab_size + config.codebook_size + 2
    logits = hidden.new_full((config.num_codebooks, *is_vision.shape, width), float("-inf"))
    logits[:, ~is_vision, : config.text_vocab_size] = model.lm_head(hidden[~is_vision])
    for codebook, head in enumerate(model.vision_lm_head):
        logits[codebook, is_vision, config.text_vocab_size :] = head(hidden[is_vision])
    return logits


@torch.no_grad()
def largest_difference(
    model: LibraForCausalLM, input_ids: torch.Tensor, image_features: torch.Tensor | None, step_id: int
) -> float:
    """
    How far the naive form and the model are apart, over a prompt and one text token after it.

    Args:
        model ([`LibraForCausalLM`]): in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(1, length)`): flat ids.
        image_features (`torch.FloatTensor` of shape `(images, patches, feature_size)` or `None`): of its images.
        step_id (`int`): the text token.

    Returns:
        `float`: the largest absolute difference of any logit.
    """
    text_size = model.config.text_vocab_size
    is_vision = input_ids[0] >= text_size
    naive, naive_cache = naive_forward(model, input_ids, image_features)
    output = model(input_ids=input_ids, image_features=image_features, use_cache=True)
    differences = [naive[0, 0, ~is_vision, :text_size] - output.logits[0, ~is_vision]]
    if output.vision_logits is not None:
        differences.append(naive[:, 0, is_vision, text_size:].transpose(0, 1) - output.vision_logits)
    step = torch.tensor([[step_id]])
    naive_step, _ = naive_forward(model, step, cache=naive_cache)
    model_step = model(input_ids=step, cache=output[CACHE_NAME], use_cache=True, logits_to_keep=1)
    differences.append(naive_step[0, :, :, :text_size] - model_step.logits)
    return max(difference.abs().max().item() for difference in differences)
