"""One attention over two views: every implementation sees the same keys, and none does more work than one attention."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_libra import routing_libra
from modeling_libra.cache_libra import CACHE_NAME
from modeling_libra.routing_libra import QUERY_BLOCK, Block, Run, packed_starts, plan_routing
from tests.modeling.implementations import running, use_flash
from tests.modeling.toys import (
    FAMILIES,
    NEWLINE,
    assert_same,
    make_config,
    make_features,
    make_image,
    make_model,
    make_rows,
    pad,
)

OTHERS = ["eager", "flex_attention", "flash_attention_2"]
MODELS = {family: make_model(make_config(family), "eager") for family in FAMILIES}


@pytest.fixture(params=[QUERY_BLOCK, 2], ids="blocks of {}".format)
def query_block(request, monkeypatch):
    """Toy rows fit into one block; with blocks of two every cut is met."""
    monkeypatch.setattr(routing_libra, "QUERY_BLOCK", request.param)


def outputs(model, attention, **inputs):
    with running(model, attention), torch.no_grad():
        return model(**inputs)


def assert_agree(family, inputs, keep, others=OTHERS):
    expected = outputs(MODELS[family], "sdpa", **inputs)
    for attention in others:
        actual = outputs(MODELS[family], attention, **inputs)
        assert_same(actual.logits[keep], expected.logits[keep], 2e-5)
        assert_same(actual.vision_logits, expected.vision_logits, 2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch(family, side, query_block):
    config = MODELS[family].config
    ids, mask = pad(make_rows(config), side)
    inputs = {"input_ids": ids, "attention_mask": mask, "image_features": make_features(config, 3)}
    assert_agree(family, inputs, mask.bool())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_in_the_middle(family, query_block):
    """As after a batched turn whose shorter answers were padded."""
    config = MODELS[family].config
    (left, left_mask), (right, right_mask) = pad(make_rows(config)), pad(make_rows(config)[::-1], "right")
    mask = torch.cat([left_mask, right_mask], dim=1)
    inputs = {"input_ids": torch.cat([left, right], dim=1), "attention_mask": mask}
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    assert_agree(family, inputs, mask.bool())


def test_compiled_flex_attention():
    """As people run it: transformers compiles the kernel. (Elsewhere the same function runs uncompiled.)"""
    config = MODELS["llama"].config
    (ids, mask), features = pad(make_rows(config)), make_features(config, 3)
    inputs = {"input_ids": ids, "attention_mask": mask, "image_features": features}
    results = []
    for attention in ("sdpa", "flex_attention"):
        MODELS["llama"].set_attn_implementation(attention)
        with torch.no_grad():
            results.append(MODELS["llama"](**inputs))
    assert_same(results[1].logits[mask.bool()], results[0].logits[mask.bool()], 2e-5)
    assert_same(results[1].vision_logits, results[0].vision_logits, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_image_through_the_cache(family, query_block):
    config = MODELS[family].config
    ids, mask = pad(make_rows(config))
    cut = 9

    def second_part(attention):
        cache = DynamicCache(config=config)
        outputs(
            MODELS[family], attention,
            input_ids=ids[:, :cut], attention_mask=mask[:, :cut], **{CACHE_NAME: cache},
        )  # fmt: skip
        return outputs(
            MODELS[family], attention,
            input_ids=ids[:, cut:], attention_mask=mask, **{CACHE_NAME: cache},
        )  # fmt: skip

    whole = outputs(MODELS[family], "sdpa", input_ids=ids, attention_mask=mask, use_cache=False)
    keep = mask.bool()[:, cut:]
    for attention in ["sdpa", *OTHERS]:
        assert_same(second_part(attention).logits[keep], whole.logits[:, cut:][keep], 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_do_not_see_each_other(family, query_block):
    """Positions that begin anew begin a new sequence, as in transformers' own models."""
    config, rows = MODELS[family].config, make_rows(MODELS[family].config)
    packed = {
        "input_ids": torch.tensor([[*chain(*rows)]]),
        "position_ids": torch.tensor([[place for row in rows for place in range(len(row))]]),
        "image_features": make_features(config, 3),
        "use_cache": False,
    }
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    for attention in ["sdpa", *OTHERS]:
        logits = outputs(MODELS[family], attention, **packed).logits[0]
        for row, end, features in zip(rows, ends, make_features(config, 3).split([2, 0, 1])):
            alone = outputs(
                MODELS[family], "sdpa",
                input_ids=torch.tensor([row]), image_features=features if len(features) else None,
            )  # fmt: skip
            assert_same(logits[end - len(row) : end], alone.logits[0], 2e-5)


@st.composite
def batches(draw):
    """Rows of text and images in any order, padded left, right or not at all."""
    config = make_config()
    text = st.lists(st.integers(14, 49), min_size=1, max_size=4)
    image = st.integers(0, 9).map(lambda seed: [*make_image(config, seed), NEWLINE])
    rows = draw(st.lists(st.lists(text | image, min_size=1, max_size=4), min_size=1, max_size=4))
    rows = [[1, *chain(*row)] for row in rows]
    return *pad(rows, draw(st.sampled_from(["left", "right"]))), draw(st.integers(1, 5))


@settings(max_examples=40)
@given(batch=batches(), family=st.sampled_from(sorted(FAMILIES)))
def test_any_layout(batch, family):
    ids, mask, block = batch
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(routing_libra, "QUERY_BLOCK", block)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if not (ids >= MODELS[family].config.text_vocab_size).any():
            return
        assert_agree(family, inputs, mask.bool())


@given(batch=batches(), past=st.sampled_from([0, 7]))
def test_streams_and_sequence(batch, past):
    """Each real token is in one stream once, and comes back to its place; padding is in none and comes back as zeros."""
    ids, mask, _ = batch
    is_vision = ids >= 50
    routing = plan_routing(is_vision, torch.nn.functional.pad(mask, (past, 0), value=1), past)
    language, vision = (stream.select(ids) for stream in (routing.language, routing.vision))
    assert torch.equal(routing.unpack(language, vision), ids * mask)
    assert not (language >= 50).any()
    assert (vision >= 50).all()
    for stream, rows in ((routing.language, language), (routing.vision, vision)):
        assert torch.equal(stream.pack(stream.rectangle(rows)), rows)
        columns = [column for block in stream.blocks for column in range(block.begin, block.end)]
        assert columns == list(range(stream.places.shape[1]))
        places = [
            row * ids.shape[1] + place - past for row, begin, end, *_ in stream.runs for place in range(begin, end)
        ]
        assert places == stream.rows.tolist()


@settings(max_examples=30)
@given(batch=batches(), family=st.sampled_from(sorted(FAMILIES)), attention=st.sampled_from(["sdpa", *OTHERS]))
def test_the_last_token_alone(batch, family, attention):
    """Where only the last token is asked for, the last layer computes nothing else; it gives the same, cache included."""
    ids, mask, _ = batch
    if not (ids >= MODELS[family].config.text_vocab_size).any():
        return
    inputs = {"input_ids": ids, "attention_mask": mask}
    last, whole = (outputs(MODELS[family], attention, **inputs, logits_to_keep=kept) for kept in (1, 0))
    real = mask[:, -1].bool()
    wide = last.logits[real][:, 0, :50]  # an image's last token has scores over all ids; text's are -inf there
    assert_same(wide, whole.logits[real][:, -1], 2e-5)
    for ours, theirs in zip(last[CACHE_NAME].layers, whole[CACHE_NAME].layers, strict=True):
        assert_same(ours.keys, theirs.keys, 2e-5)
        assert_same(ours.values, theirs.values, 2e-5)
    is_vision = (ids[:, -1] >= 50) & real
    if is_vision.any():
        everything = torch.zeros(*ids.shape, 2, 8)
        everything[ids >= 50] = whole.vision_logits
        assert_same(last.vision_logits, everything[is_vision, -1], 2e-5)


def test_blocks_and_runs_by_hand(monkeypatch):
    monkeypatch.setattr(routing_libra, "QUERY_BLOCK", 3)
    is_vision = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()
    routing = plan_routing(is_vision, past_length=5)
    assert routing.language.blocks == [Block(0, 2, 5, 6), Block(2, 3, 14, 14)]
    assert routing.vision.blocks == [Block(0, 3, 7, 9), Block(3, 7, 10, 13)]
    assert routing.language.runs == [Run(0, 5, 7, 0, None), Run(0, 14, 15, 0, None)]
    assert routing.vision.runs == [Run(0, 7, 14, 0, None)]


def test_packed_starts():
    assert packed_starts(torch.tensor([[0, 1, 2], [4, 5, 6]])) is None
    assert packed_starts(torch.tensor([[0, 1, 0, 1, 0]])).tolist() == [[0, 0, 2, 2, 4]]


def test_a_mask_for_other_tokens_is_refused():
    ids = torch.tensor([make_rows(make_config())[0]])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\).*\(1, 0 \+ 19\)"):
        MODELS["llama"](input_ids=ids, attention_mask=torch.ones(1, 3))


def test_a_mask_that_hides_part_of_an_image_is_refused():
    ids = torch.tensor([make_rows(make_config())[0]])
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="holds 8 patches, but attention_mask leaves 7 image tokens"):
        MODELS["llama"](input_ids=ids, attention_mask=mask, image_features=make_features(make_config(), 2))


# What one attention costs. Nothing here is timed: operations and sizes are counted.

LONG = {"hidden_size": 64, "intermediate_size": 176, "max_position_embeddings": 4096, "num_attention_heads": 2}


def long_inputs(length=1536, layers=1):
    """A prompt of six images with text between, of about the given length."""
    config = make_config(text=LONG | {"num_hidden_layers": layers}, image_grid=14)
    text = (length - 6 * (config.num_patches + 3)) // 6
    row = [1]
    for image in range(6):
        row += [*range(14, 14 + text % 30), *[20] * (text - text % 30), *make_image(config, image), NEWLINE]
    return config, torch.tensor([row])


class CountAttention(TorchDispatchMode):
    """Counts the scores that kernels of scaled dot product attention compute: queries x keys x heads x batch."""

    def __init__(self):
        super().__init__()
        self.scores = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name():
            (batch, heads, queries, _), keys = args[0].shape, args[1].shape[2]
            self.scores += batch * heads * queries * keys
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cached", [False, True])
def test_attention_costs_at_most_one_attention(cached):
    """No more scores than the bare LLM's over as many tokens; fewer, because blocks end their keys where they end."""
    config, ids = long_inputs(layers=2)
    model, bare = make_model(config), AutoModelForCausalLM.from_config(config.text_config).eval()
    counts = []
    for runs, tokens in ((model, ids), (bare, ids.clamp(max=49))):
        with torch.no_grad(), CountAttention() as count:
            runs(input_ids=tokens, use_cache=cached, logits_to_keep=2)
        counts.append(count.scores)
    ours, theirs = counts
    assert theirs == 2 * 2 * ids.shape[1] ** 2
    assert 0 < ours < 0.75 * theirs


def test_the_rows_of_both_streams_are_computed_once():
    """Norms and projections see every row once: multiply-adds are those of language rows and of low-rank vision rows."""
    config, ids = long_inputs()
    model = make_model(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids, use_cache=False)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    hidden, inner, down = 64, 176, config.expert_down_ratio
    key_size = hidden // 2 * config.text_config.num_key_value_heads
    vision = int((ids >= config.text_vocab_size).sum())
    language = ids.numel() - vision
    maps = [(hidden, hidden), (hidden, hidden), (hidden, key_size), (hidden, key_size)]
    maps += [(hidden, inner), (hidden, inner), (inner, hidden)]
    dense = sum(a * b for a, b in maps)
    low_rank = sum((a + b) * (b // down) for a, b in maps)
    bridge = 2 * config.bridge_rank * (hidden + key_size)  # keys and values; every row is read by the other side
    hybrid = (hidden + config.feature_size) * hidden
    expected = language * (dense + bridge) + vision * (low_rank + bridge + hybrid)
    assert counted == 2 * expected
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    # One layer: of the expert keys and values, of the LLM these and one row (the last, which is text), and its head.
    keys_and_values = language * 2 * hidden * key_size + vision * 2 * (hidden + key_size) * (key_size // down)
    one_row = dense - 2 * hidden * key_size + 50 * hidden
    expected = keys_and_values + one_row + (language + vision) * bridge + vision * hybrid
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 2 * expected


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor made while it is on."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_quadratic(attention, padded, monkeypatch):
    """No tensor of length x length appears, with padding and without, in a prefill or in training."""
    config, ids = long_inputs()
    model, length = make_model(config), ids.shape[1]
    if attention == "flash_attention_2":
        monkeypatch.setattr("tests.modeling.implementations.flash_attn_func", lambda query, *_, **__: query)
        use_flash(model, monkeypatch)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0 if padded else 1
    with torch.no_grad(), LargestTensor() as prefill:
        model(input_ids=ids, attention_mask=mask, logits_to_keep=2)
    with LargestTensor() as training:
        model.train()(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(ids < 50, -100)).loss.backward()
    assert max(prefill.elements, training.elements) <= 2 * QUERY_BLOCK * length
    assert 2 * QUERY_BLOCK * length < length * length / 3


def test_nothing_quadratic_would_be_seen():
    """The counter of the test above does find the square that eager attention makes."""
    config, ids = long_inputs()
    with torch.no_grad(), LargestTensor() as largest:
        make_model(config, "eager")(input_ids=ids, logits_to_keep=2)
    assert largest.elements >= ids.shape[1] ** 2 / 2
