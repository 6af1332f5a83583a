"""Counted floors: the multiply-adds and bytes that an implementation of each side cannot save.

A floor is the ratio of two counts. Where arithmetic rules (prefill, training) multiply-adds are counted: matrix
products, and attention over the causal half of the square. Norms, activations, rotary embeddings and copies are not:
they cost time and no multiply-adds worth counting, which is why a measured ratio stays above its floor. Where memory
traffic rules (a decoding step) the bytes read are counted: every weight once, and the cache once.

A matrix has as many weights as one row costs multiply-adds, so the functions per row count both. All take a
[`LibraConfig`] on a Llama without grouped heads.
"""

from typing import NamedTuple

from modeling_libra import LibraConfig

BYTES = 4
"""Of a float32."""


class Rows(NamedTuple):
    """
    Tokens by modality.

    Args:
        text (`int`): text tokens.
        vision (`int`): image tokens, BOI and EOI included.
    """

    text: int
    vision: int


LAST_ROW = Rows(1, 0)
"""The rows that get logits in a prefill: the last, which is text."""


def language_layer(config: LibraConfig) -> int:
    """Per row: the LLM's q, k, v, o (`D x D`) and gate, up, down (`D x I`) of one layer."""
    hidden, inner = config.text_config.hidden_size, config.text_config.intermediate_size
    return 4 * hidden * hidden + 3 * hidden * inner


def expert_layer(config: LibraConfig) -> int:
    """Per row: the expert's seven low-rank maps of one layer; 0.65 of [`language_layer`] at full size."""
    hidden, inner = config.text_config.hidden_size, config.text_config.intermediate_size

    def low_rank(inputs: int, outputs: int) -> int:
        return (outputs // config.expert_down_ratio) * (inputs + outputs)

    return 4 * low_rank(hidden, hidden) + 2 * low_rank(hidden, inner) + low_rank(inner, hidden)


def bridge_latents_layer(config: LibraConfig) -> int:
    """Per row: the down-projections of the bridge for keys and values, which the cache keeps for a later image."""
    return 2 * config.bridge_rank * config.text_config.hidden_size


def bridge_layer(config: LibraConfig) -> int:
    """Per row: the bridge for keys and values of one layer, both halves."""
    return 2 * bridge_latents_layer(config)


def hybrid_embedding(config: LibraConfig) -> int:
    """Per row: the projection of `[E_d; E_c]` to the hidden size."""
    hidden = config.text_config.hidden_size
    return (hidden + config.feature_size) * hidden


def text_head(config: LibraConfig) -> int:
    """Per row: the language head."""
    return config.text_vocab_size * config.text_config.hidden_size


def vision_heads(config: LibraConfig) -> int:
    """Per row: one head a codebook."""
    return config.num_codebooks * (config.codebook_size + 2) * config.text_config.hidden_size


def causal_attention(config: LibraConfig, tokens: int) -> int:
    """All layers: scores and weighted sum, each query with the tokens up to its own."""
    pairs = tokens * (tokens + 1) // 2
    return config.text_config.num_hidden_layers * 2 * pairs * config.text_config.hidden_size


def llama_forward(config: LibraConfig, tokens: int, head_rows: int = 1) -> int:
    """The bare LLM on `tokens` rows, with logits of `head_rows`."""
    layers = config.text_config.num_hidden_layers * language_layer(config) * tokens
    return layers + causal_attention(config, tokens) + head_rows * text_head(config)


def libra_forward(config: LibraConfig, rows: Rows, head_rows: Rows = LAST_ROW) -> int:
    """
    Libra with a cache: every row through the weights of its modality, one attention.

    Of the bridge, text alone needs the latents only. Where only the last row gets logits and there is an image, the last
    layer computes keys and values of all rows, and of the last row the rest.

    Args:
        config ([`LibraConfig`]): the model's.
        rows ([`Rows`]): tokens of the prompt.
        head_rows ([`Rows`], *optional*, defaults to `LAST_ROW`): rows that get logits.

    Returns:
        `int`: multiply-adds.
    """
    bridge = bridge_layer(config) if rows.vision else bridge_latents_layer(config)
    layer = rows.text * language_layer(config) + rows.vision * expert_layer(config) + sum(rows) * bridge
    skipped = last_layer_rest(config, rows) if rows.vision and head_rows == LAST_ROW else 0
    return (
        config.text_config.num_hidden_layers * layer
        + causal_attention(config, sum(rows))
        - skipped
        + rows.vision * hybrid_embedding(config)
        + head_rows.text * text_head(config)
        + head_rows.vision * vision_heads(config)
    )


def last_layer_rest(config: LibraConfig, rows: Rows) -> int:
    """What the last layer does for all rows but the last, which is text, beside their keys and values."""
    hidden, tokens = config.text_config.hidden_size, sum(rows)
    text = (rows.text - 1) * (language_layer(config) - 2 * hidden * hidden)
    key_and_value = 2 * (hidden // config.expert_down_ratio) * 2 * hidden
    vision = rows.vision * (expert_layer(config) - key_and_value)
    return text + vision + 2 * hidden * (tokens * (tokens + 1) // 2 - tokens)


def naive_forward(config: LibraConfig, rows: Rows) -> int:
    """The naive form: a second attention, and logits of all rows."""
    return libra_forward(config, rows, head_rows=rows) + causal_attention(config, sum(rows))


def llama_training_step(config: LibraConfig, tokens: int) -> int:
    """Forward and backward of the bare LLM, all rows supervised: each product comes back as two."""
    return 3 * llama_forward(config, tokens, head_rows=tokens)


def libra_pretraining_step(config: LibraConfig, vision_rows: int, text_rows_after: int) -> int:
    """
    Forward and backward of BOS, image, newline, caption with the LLM frozen.

    Products with weights of the vision system and those of attention come back as two, as in full training. Those with
    frozen weights come back as one (no gradient of the weight), and not at all for BOS, and for queries, keys and
    values of text in the first layer: nothing trainable is before them.

    Args:
        config ([`LibraConfig`]): the model's.
        vision_rows (`int`): tokens of the image; all but EOI predict a code or EOI.
        text_rows_after (`int`): newline and caption; all but the last token predict a word.

    Returns:
        `int`: multiply-adds. The optimizer's step is not in them: it is a pass over the trained weights.
    """
    rows, supervised = Rows(1 + text_rows_after, vision_rows), Rows(text_rows_after - 1, vision_rows - 1)
    layers, hidden = config.text_config.num_hidden_layers, config.text_config.hidden_size
    trained = (
        layers * (rows.vision * expert_layer(config) + sum(rows) * bridge_layer(config))
        + rows.vision * hybrid_embedding(config)
        + supervised.vision * vision_heads(config)
        + causal_attention(config, sum(rows))
    )
    frozen = layers * text_rows_after * language_layer(config) + supervised.text * text_head(config)
    frozen -= 3 * text_rows_after * hidden * hidden  # q, k, v of the first layer
    return libra_forward(config, rows, head_rows=supervised) + 2 * trained + frozen


def cache_floor(config: LibraConfig, tokens: int) -> tuple[int, int, int]:
    """
    Bytes of the caches over `tokens` tokens.

    Returns:
        `tuple` of three `int`: Libra (keys and values, and `2 * bridge_rank` latents a token a layer), the bare LLM
        (keys and values), the naive form (both of both views).
    """
    layers, hidden = config.text_config.num_hidden_layers, config.text_config.hidden_size
    one = tokens * layers * BYTES
    return one * 2 * (hidden + config.bridge_rank), one * 2 * hidden, one * 4 * hidden


def step_floor(config: LibraConfig, cached: int) -> tuple[int, int, int]:
    """
    Bytes read by a decoding step of one text token after `cached` tokens: weights and cache, once.

    Returns:
        `tuple` of three `int`: Libra (the LLM's weights and keys, and what makes the new token's latents), the bare
        LLM, the naive form (the whole bridge, and both views).
    """
    layers = config.text_config.num_hidden_layers
    _, plain, both_views = cache_floor(config, cached)
    weights = BYTES * (layers * language_layer(config) + text_head(config))
    return (
        weights + BYTES * layers * bridge_latents_layer(config) + plain,
        weights + plain,
        weights + BYTES * layers * bridge_layer(config) + both_views,
    )


def prefill_memory_floor(config: LibraConfig, rows: Rows) -> tuple[int, int]:
    """
    Bytes alive at the peak of a prefill: in the last layer's MLP, for Libra in the one before (see [`libra_forward`]).

    The bare LLM, as transformers writes it, holds per token: all keys and values, cos and sin, three inner activations
    (gate, up, their product) and four hidden states (embeddings, the layer's input, the residual, the normed input).
    Libra must hold the cache with its latents, the residual and the normed input, and runs one modality after the
    other: three inner activations for the larger one only.

    Args:
        config ([`LibraConfig`]): the model's.
        rows ([`Rows`]): tokens of the prompt.

    Returns:
        `tuple` of two `int`: Libra, the bare LLM.
    """
    text = config.text_config
    hidden, inner, tokens = text.hidden_size, text.intermediate_size, sum(rows)
    head_dim = hidden // text.num_attention_heads
    ours, bare, _ = cache_floor(config, tokens)
    layers = text.num_hidden_layers
    return (
        ours * (layers - 1) // layers + BYTES * (2 * tokens * hidden + 3 * max(rows) * inner),
        bare + BYTES * tokens * (4 * hidden + 2 * head_dim + 3 * inner),
    )
