"""The authors' released layout of the language model, in our terms: configuration, parameter names, ids.

The release was written for transformers 4.38. It keeps language and vision parameters in the same modules, and ids in an
array (codebook, batch, length) in which entry `e` of either codebook is `V + e`.
"""

import re

import torch

from .configuration_libra import LibraConfig

# Options of the release that its published weights leave off; a checkpoint that turns one on is another model.
_UNSUPPORTED_OPTIONS = {
    "vision_prediction_mode": "1d",
    "use_2d_rope": False,
    "unified_head": False,
    "addition_mode": False,
    "use_vision_position_embedding": False,
    "concat_signals": True,
    "norm_signals": True,
}

# Everything of the released config that is the language model's own.
_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

_DROPPED = re.compile(r"placeholder|rotary_emb\.inv_freq$")

# Released name -> ours, tried in this order; `\1` and `\2` are the groups.
_RENAMES = [
    (r"^lm_head\.weight$", r"lm_head.weight"),
    (r"^vision_lm_head\.heads\.(\d+)\.weight$", r"vision_lm_head.\1.weight"),
    (r"^model\.vision_embed_tokens\.(\d+)\.weight$", r"model.vision_model.embedding.embed_tokens.\1.weight"),
    (r"^model\.vision_signal_norm\.weight$", r"model.vision_model.embedding.norm.weight"),
    (r"^model\.vision_contiguous_signal_processor\.weight$", r"model.vision_model.embedding.proj.weight"),
    (r"^model\.vision_norm\.weight$", r"model.vision_model.norm.weight"),
    (
        r"^model\.layers\.(\d+)\.vision_((?:input|post_attention)_layernorm)\.weight$",
        r"model.vision_model.layers.\1.\2.weight",
    ),
    (
        r"^model\.layers\.(\d+)\.(self_attn|mlp)\.vision_(\w+)\.weight_([AB])$",
        r"model.vision_model.layers.\1.\2.\3.\4.weight",
    ),
    (r"^model\.(embed_tokens|norm)\.weight$", r"model.language_model.\1.weight"),
    (
        r"^model\.layers\.(\d+)\.((?:input|post_attention)_layernorm|self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
        r"\.weight$",
        r"model.language_model.layers.\1.\2.weight",
    ),
]


def convert_config(released: dict) -> LibraConfig:
    """
    Our configuration for a released one.

    Args:
        released (`dict`): the contents of the released `config.json`.

    Returns:
        [`LibraConfig`]

    Raises:
        ValueError: if a field is missing, or an option is on that no published weights use.
    """
    for option, published in _UNSUPPORTED_OPTIONS.items():
        if released.get(option, published) != published:
            raise ValueError(
                f"The released config has {option}={released[option]!r}; only {published!r}, as in the published "
                "weights, can be converted."
            )
    required = ("vocab_size", "hidden_size", "vision_vocab_size", "image_feature_resolution", "contiguous_signal_size")
    missing = [key for key in required if key not in released]
    if missing:
        raise ValueError(f"The released config lacks {', '.join(missing)}; is this the config.json of a Libra release?")
    text_config = {key: released[key] for key in _TEXT_KEYS if key in released}
    return LibraConfig(
        text_config={"model_type": "llama", **text_config},
        image_grid=released["image_feature_resolution"],
        num_codebooks=released.get("vision_codebook_num", 2),
        codebook_size=released["vision_vocab_size"] - 2,
        feature_size=released["contiguous_signal_size"],
        expert_down_ratio=released.get("vision_down_ratio", 4),
        bridge_rank=released.get("bridge_rank", 8),
        use_bridge=released.get("use_bridge", True),
        newline_token_id=released.get("newline_token_id", 13),
        dtype=released.get("torch_dtype"),
    )


def convert_key(released: str) -> str | None:
    """
    Our name of a released parameter.

    Args:
        released (`str`): key of the released state dict.

    Returns:
        `str` or `None`: our key; `None` for buffers that have no meaning (placeholders, rotary frequencies).

    Raises:
        ValueError: if the key is unknown.
    """
    if _DROPPED.search(released):
        return None
    for pattern, replacement in _RENAMES:
        if re.match(pattern, released):
            return re.sub(pattern, replacement, released)
    raise ValueError(f"Unknown parameter {released!r}: it is not part of the released Libra layout.")


def convert_state_dict(released: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A released state dict (or one shard of it) under our names.

    Args:
        released (`dict` of `torch.Tensor`): released keys and weights.

    Returns:
        `dict` of `torch.Tensor`: the same tensors under our keys, without the dropped buffers.

    Raises:
        ValueError: naming all keys that are unknown.
    """
    converted, unknown = {}, []
    for key, tensor in released.items():
        try:
            new_key = convert_key(key)
        except ValueError:
            unknown.append(key)
            continue
        if new_key is not None:
            converted[new_key] = tensor
    if unknown:
        raise ValueError(f"Unknown parameters, not part of the released Libra layout: {', '.join(sorted(unknown))}.")
    return converted


def convert_ids(released: torch.Tensor, config: LibraConfig) -> torch.Tensor:
    """
    Flat ids for ids (or labels) of the released format.

    Args:
        released (`torch.LongTensor` of shape `(num_codebooks, batch, length)`): text id or `V + entry`; -100 stays.
        config ([`LibraConfig`]): names V and the codebooks.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`.
    """
    entries = released - config.text_vocab_size
    code = torch.zeros_like(entries[0])
    for codebook in entries:
        code = code * config.codebook_size + codebook
    code = torch.where(entries[0] == config.codebook_size, config.num_image_codes, code)
    code = torch.where(entries[0] == config.codebook_size + 1, config.num_image_codes + 1, code)
    return torch.where(entries[0] >= 0, config.text_vocab_size + code, released[0])
