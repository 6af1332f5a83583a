"""One attention over two views, through the attention functions of transformers (eager, sdpa, flash, flex).

Every query attends to one view: language queries to the language view of keys and values, vision queries to the vision
view. So the work is that of one attention. What a query may see is an interval of places that ends at its own, less
padding; except with eager attention it is never written down for all queries at once.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .routing_libra import Routing, Stream

FLEX_BLOCK = 128


def attend(
    language_attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stream: Stream,
    routing: Routing,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention of the queries of one modality over their view.

    Args:
        language_attention (`nn.Module`):
            The LLM's attention module of the layer; it says how (implementation, scaling, dropout, sliding window).
        query (`torch.Tensor` of shape `(rows, heads, head_dim)`): packed.
        key, value (`torch.Tensor` of shape `(batch, key heads, keys, head_dim)`):
            The view of this modality, past included. A static cache may hold more keys than there are tokens so far,
            a sliding one fewer.
        stream ([`Stream`]): where the queries are.
        routing ([`Routing`]): padding and packing.

    Returns:
        `tuple`: the packed outputs `(rows, heads, head_dim)`, and the weights `(rows, heads, keys)` with eager attention.
    """
    config = language_attention.config
    implementation = config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    window = getattr(language_attention, "sliding_window", getattr(config, "sliding_window", None))
    how = {
        "dropout": language_attention.attention_dropout if language_attention.training else 0.0,
        "scaling": language_attention.scaling,
        "sliding_window": window,
    }
    if not stream.blocks:  # nothing asks; the view stays in the graph, because DDP waits for its parameters
        nothing = (key[:, :, :0] + value[:, :, :0]).reshape(0, 1, key.shape[3])
        return query + nothing, query.new_zeros(0, query.shape[1], key.shape[2]) if implementation == "eager" else None
    offset = max(0, routing.total_length - key.shape[2])  # the place of the first key
    if "flash" in implementation:
        return _attend_runs(attention, language_attention, query, key, value, stream, offset, how), None
    rectangle = stream.rectangle(query).transpose(1, 2)  # (batch, heads, width, head_dim)
    if implementation == "eager":
        visible = visible_keys(stream, routing, slice(None), range(offset, offset + key.shape[2]), window)
        mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, torch.finfo(query.dtype).min)
        output, weights = attention(language_attention, rectangle, key, value, mask, **how)
        return stream.pack(output), stream.pack(weights.transpose(1, 2))
    if implementation == "flex_attention":
        block_mask = flex_mask(stream, routing, range(offset, offset + key.shape[2]), window)
        return stream.pack(attention(language_attention, rectangle, key, value, block_mask, **how)[0]), None
    outputs = []
    for block in stream.blocks:
        first = offset if window is None else max(offset, block.low + 1 - window)
        seen = slice(first - offset, block.high + 1 - offset)
        keys = range(first, block.high + 1)
        if window is None and _is_plain(stream, routing, block):
            mask = routing.triangle(block.end - block.begin, len(keys), query.dtype)
        else:
            mask = visible_keys(stream, routing, slice(block.begin, block.end), keys, window)
        queries = rectangle[:, :, block.begin : block.end]
        outputs.append(attention(language_attention, queries, key[:, :, seen], value[:, :, seen], mask, **how)[0])
    return stream.pack(torch.cat(outputs, dim=1)), None


def _is_plain(stream, routing, block):
    """Whether the queries of a block follow each other, at the same places in all rows, and see all that is before them."""
    follow = block.high - block.low == block.end - block.begin - 1
    return follow and len(stream.places) == 1 and routing.valid is None and routing.starts is None


def visible_keys(stream: Stream, routing: Routing, columns: slice, keys: range, window: int | None) -> torch.Tensor:
    """
    Which keys queries see.

    Args:
        stream ([`Stream`]): the queries.
        routing ([`Routing`]): padding and packing.
        columns (`slice`): of the queries' rectangle.
        keys (`range`): places of the keys.
        window (`int` or `None`): width of the sliding window, the query's own place included.

    Returns:
        `torch.BoolTensor` of shape `(batch or 1, 1, columns, keys)`.
    """
    places = stream.places[:, columns, None]  # (batch or 1, columns, 1)
    key_places = torch.arange(keys.start, keys.stop, device=places.device)
    visible = key_places <= places
    if window is not None:
        visible &= key_places > places - window
    if routing.starts is not None:
        visible = visible & (key_places >= _starts(stream, routing)[:, columns, None])
    if routing.valid is not None:
        valid = routing.valid[:, keys.start : keys.stop]
        valid = nn.functional.pad(valid, (0, len(keys) - valid.shape[1]))  # a static cache is longer
        visible = visible & valid[:, None]
    return visible[:, None]


def _starts(stream, routing):
    places = stream.places.expand(routing.shape[0], -1)
    return routing.starts.gather(1, places)  # (batch, width); packing excludes a past, so places count from 0


def flex_mask(stream: Stream, routing: Routing, keys: range, window: int | None) -> BlockMask:
    """
    The same for flex attention, block by block: which blocks of keys a block of queries may see is computed here, which
    keys it does see inside the kernel.

    Args:
        stream ([`Stream`]), routing ([`Routing`]), keys (`range`), window (`int` or `None`): as in [`visible_keys`].

    Returns:
        `BlockMask`
    """
    batch, width = routing.shape[0], stream.places.shape[1]
    # Longer than the queries and the keys they speak of: their kernel on the CPU does not compile if they are as long.
    fill = (0, FLEX_BLOCK - width % FLEX_BLOCK)
    places = nn.functional.pad(stream.places.expand(batch, -1), fill, mode="replicate")  # (batch, width + fill)
    starts = None if routing.starts is None else nn.functional.pad(_starts(stream, routing), fill)
    valid = None if routing.valid is None else nn.functional.pad(routing.valid, (0, FLEX_BLOCK + len(keys)))

    def sees(row, head, query, key):
        place, key_place = places[row, query], key + keys.start
        seen = key_place <= place
        if window is not None:
            seen = seen & (key_place > place - window)
        if starts is not None:
            seen = seen & (key_place >= starts[row, query])
        if valid is not None:
            seen = seen & valid[row, key_place]
        return seen

    last = places.unflatten(1, (-1, FLEX_BLOCK)).amax(dim=2) - keys.start  # (batch, query blocks)
    last = last[:, : -(-width // FLEX_BLOCK)]
    key_blocks = -(-len(keys) // FLEX_BLOCK)
    counts = (last // FLEX_BLOCK + 1).clamp(max=key_blocks).int()[:, None]
    indices = torch.arange(key_blocks, dtype=torch.int32, device=places.device).expand(*counts.shape, -1).contiguous()
    return BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(width, len(keys))
    )


def _attend_runs(attention, language_attention, query, key, value, stream, offset, how):
    """Flash attention has no masks: one call for each run of queries, over keys that end where the run ends."""
    outputs = []
    for run, queries in zip(stream.runs, query.split([run.end - run.begin for run in stream.runs])):
        seen = slice(max(run.first - offset, 0), run.end - offset)
        if run.seen is not None:
            seen = (run.seen[run.seen >= offset] - offset).to(key.device)
        output, _ = attention(
            language_attention,
            queries.transpose(0, 1)[None],  # (1, heads, queries, head_dim)
            key[run.row, None, :, seen],
            value[run.row, None, :, seen],
            None,
            is_causal=True,  # bottom-right: the last query sees the last key
            **how,
        )
        outputs.append(output[0])  # (queries, heads, head_dim)
    return torch.cat(outputs)
