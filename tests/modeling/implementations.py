"""Models on any attention kernel, and a stand-in for the flash_attn package, which needs a GPU."""

import functools
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from transformers import modeling_flash_attention_utils as utils

from modeling_libra import LibraForCausalLM


def flash_attn_func(
    query, key, value, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=None
):
    """
    What `flash_attn.flash_attn_func` computes: `(batch, length, heads, head_dim)` in and out, grouped heads, a causal mask
    that is aligned at the bottom right, and windows counted from there.
    """
    queries, keys = query.shape[1], key.shape[1]
    key, value = (states.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for states in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * softmax_scale
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)[None]  # 0: the query's own key
    if causal:
        scores = scores.masked_fill(distance < 0, float("-inf"))
    if window_size[0] >= 0:
        scores = scores.masked_fill(distance > window_size[0], float("-inf"))
    weights = torch.nn.functional.dropout(scores.softmax(dim=-1), dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def flash_attn_varlen_func(query, key, value, cu_seqlens_q, cu_seqlens_k, **kwargs):
    """The same over packed sequences; transformers calls it for padded text."""
    parts = [states.split(lengths.diff().tolist()) for states, lengths in
             ((query, cu_seqlens_q), (key, cu_seqlens_k), (value, cu_seqlens_k))]  # fmt: skip
    return torch.cat([flash_attn_func(*(part[None] for part in one), **kwargs)[0] for one in zip(*parts)])


def use_flash(model: LibraForCausalLM, monkeypatch: pytest.MonkeyPatch) -> LibraForCausalLM:
    """Runs a model through transformers' own `flash_attention_2`, down to the calls of the package."""
    process = functools.partial(
        utils._process_flash_attention_kwargs,
        supports_mapping=defaultdict(bool, dropout_p=True, window_size=True),
    )
    functions = flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input
    # Later releases have a second function, for paged caches.
    prepare = (process, None) if hasattr(utils, "_process_with_kvcache_kwargs_fn") else process
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, prepare))
    for config in (model.config, model.config.text_config):
        config._attn_implementation = "flash_attention_2"
    return model


@contextmanager
def running(model: LibraForCausalLM, attention: str):
    """The model on a kernel; flex attention uncompiled, because it compiles for minutes on a CPU."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if attention == "flash_attention_2":
            yield use_flash(model, monkeypatch)
            return
        model.set_attn_implementation(attention)
        with torch.compiler.set_stance("force_eager" if attention == "flex_attention" else "default"):
            yield model
