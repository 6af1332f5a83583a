"""Different ways to the same numbers: cached and not, batched and single, padded and not, saved and loaded, any kernel."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_libra import LibraForCausalLM
from modeling_libra.cache_libra import CACHE_NAME
from tests.modeling.toys import (
    FAMILIES,
    FAMILIES_AND_KERNELS,
    NEWLINE,
    assert_same,
    make_config,
    make_features,
    make_image,
    make_model,
    make_rows,
    pad,
    randomize,
)

ATTENTIONS = ["sdpa", "eager"]


@pytest.fixture(params=FAMILIES_AND_KERNELS, ids="-".join)
def any_model(request) -> LibraForCausalLM:
    family, attention = request.param
    return make_model(make_config(family), attention)


@pytest.fixture(params=ATTENTIONS)
def model(request) -> LibraForCausalLM:
    return make_model(make_config(), request.param)


def full(model, ids, features=None, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, image_features=features, **inputs)


def in_chunks(model, ids, cuts, features=None, mask=None, cache=None):
    """Logits `(batch, length, V)` of ids passed chunk by chunk through the cache; features by where a chunk begins."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = []
    for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
        inputs = {CACHE_NAME: cache, "features": (features or {}).get(begin)}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
            inputs |= {"attention_mask": mask[:, :end], "position_ids": positions}
        logits.append(full(model, ids[:, begin:end], **inputs).logits)
    return torch.cat(logits, dim=1)


def finite(logits):
    """Logits with the rows of vision tokens blanked, so that differences are numbers."""
    return logits.masked_fill(logits == float("-inf"), 0.0)


def test_step_by_step(any_model):
    ids = torch.tensor([make_rows(any_model.config)[0]])
    expected = full(any_model, ids, use_cache=False)
    stepped = in_chunks(any_model, ids, range(1, ids.shape[1]))
    assert_same(stepped, expected.logits)


def test_any_cut(model):
    """Chunks may end anywhere, inside images too, as long as those have no features."""
    ids = torch.tensor([make_rows(model.config)[0]])
    expected = full(model, ids, use_cache=False).logits
    for cut in range(1, ids.shape[1]):
        assert_same(in_chunks(model, ids, [cut]), expected)


def test_vision_logits_through_the_cache(any_model):
    ids = torch.tensor([make_rows(any_model.config)[0]])
    expected = full(any_model, ids, use_cache=False).vision_logits
    cache, parts = DynamicCache(config=any_model.config), []
    for chunk in ids.split(5, dim=1):
        parts.append(full(any_model, chunk, **{CACHE_NAME: cache}).vision_logits)
    assert_same(torch.cat([part for part in parts if part is not None]), expected)


def test_second_image_with_features_through_the_cache(any_model):
    config = any_model.config
    ids, features = torch.tensor([make_rows(config)[0]]), make_features(config, 2)
    expected = full(any_model, ids, features, use_cache=False).logits
    second = ids[0].tolist().index(config.boi_token_id, 5)
    for cut in (second - 2, second):
        assert_same(in_chunks(any_model, ids, [cut], {0: features[:1], cut: features[1:]}), expected)


def test_padded_batch_through_the_cache(any_model):
    config = any_model.config
    (ids, mask), features = pad(make_rows(config)), make_features(config, 3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = full(any_model, ids, features, attention_mask=mask, position_ids=positions, use_cache=False).logits
    chunked = in_chunks(any_model, ids, range(17, ids.shape[1]), {0: features}, mask)
    keep = mask.bool()
    assert_same(chunked[keep], expected[keep])


@pytest.mark.parametrize("positions", ["from the mask", "absent"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_is_single(any_model, side, positions):
    """Rows with two images, none and one: each as if it were alone and unpadded."""
    config = any_model.config
    rows, features = make_rows(config), make_features(config, 3)
    ids, mask = pad(rows, side)
    inputs = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions == "from the mask" else {}
    batched = full(any_model, ids, features, attention_mask=mask, **inputs)
    singles = [
        full(any_model, torch.tensor([row]), row_features if len(row_features) else None)
        for row, row_features in zip(rows, features.split([2, 0, 1]), strict=True)
    ]
    for i, single in enumerate(singles):
        assert_same(batched.logits[i][mask[i].bool()], single.logits[0])
    assert singles[1].vision_logits is None
    assert_same(batched.vision_logits, torch.cat([singles[0].vision_logits, singles[2].vision_logits]))
    assert batched.logits.isnan().sum() == 0


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_agree(family, attention):
    config = make_config(family)
    (ids, mask), features = pad(make_rows(config)), make_features(config, 3)
    with torch.compiler.set_stance("force_eager"):  # flex attention compiles itself, for minutes on a CPU
        first, second = (
            full(make_model(config, kernel), ids, features, attention_mask=mask) for kernel in ("sdpa", attention)
        )
    keep = mask.bool()
    assert_same(second.logits[keep], first.logits[keep])
    assert_same(second.vision_logits, first.vision_logits)


def test_the_attention_kernel_reaches_the_language_model(toy_config, tmp_path):
    make_model(toy_config).save_pretrained(tmp_path)
    model = LibraForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    attention = model.model.language_model.layers[0].self_attn
    assert model.config._attn_implementation == attention.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == attention.config._attn_implementation == "sdpa"


def test_all_ones_mask_is_no_mask(model):
    ids = torch.tensor([make_rows(model.config)[0]])
    assert torch.equal(full(model, ids).logits, full(model, ids, attention_mask=torch.ones_like(ids)).logits)


def test_only_differences_of_positions_matter(model):
    ids = torch.tensor([make_rows(model.config)[0]])
    shifted = full(model, ids, position_ids=torch.arange(ids.shape[1])[None] + 30)
    assert_same(shifted.logits, full(model, ids).logits)


def test_given_positions_are_used(model):
    ids = torch.tensor([make_rows(model.config)[1]])
    spread = full(model, ids, position_ids=torch.arange(ids.shape[1])[None] * 3)
    assert not torch.allclose(spread.logits, full(model, ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    "kept", [3, torch.tensor([0, 4, 9]), torch.tensor([2])], ids=["last 3", "three rows", "one row"]
)
def test_logits_to_keep(toy_model, toy_config, kept):
    ids, features = torch.tensor([make_rows(toy_config)[0]]), make_features(toy_config, 2)
    everything, some = full(toy_model, ids, features), full(toy_model, ids, features, logits_to_keep=kept)
    rows = torch.arange(ids.shape[1])[-kept:] if isinstance(kept, int) else kept
    assert_same(some.logits, everything.logits[:, rows], 1e-5)
    places = (ids[0] >= toy_config.text_vocab_size).nonzero().squeeze(1)
    vision = everything.vision_logits[torch.isin(places, rows)]
    assert (some.vision_logits is None) == (len(vision) == 0)
    if len(vision):
        assert_same(some.vision_logits, vision, 1e-5)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_caches(model, cache_class):
    sizes = {"max_cache_len": 40} if cache_class is StaticCache else {}
    ids = torch.tensor([make_rows(model.config)[0]])
    expected = full(model, ids, use_cache=False).logits
    assert_same(in_chunks(model, ids, [4, 8], cache=cache_class(config=model.config, **sizes)), expected)


def test_cache_is_returned_when_asked(toy_model):
    ids = torch.tensor([[1, 5, 7]])
    assert full(toy_model, ids, use_cache=True)[CACHE_NAME].get_seq_length() == 3
    assert CACHE_NAME not in full(toy_model, ids, use_cache=False)
    assert CACHE_NAME not in toy_model.train()(input_ids=ids)


def test_tuples(toy_model):
    ids = torch.tensor([[1, 5, 7]])
    output = full(toy_model, ids, output_hidden_states=True)
    plain = full(toy_model, ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], output.logits)
    assert len(output.hidden_states) == toy_model.config.text_config.num_hidden_layers + 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_is_loaded(family, tied, tmp_path):
    config = make_config(family, text={"tie_word_embeddings": tied})
    model = make_model(config)
    model.save_pretrained(tmp_path)
    loaded = LibraForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight) == tied
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name
    ids, features = torch.tensor([make_rows(config)[0]]), make_features(config, 2)
    assert torch.equal(full(model, ids, features).logits, full(loaded, ids, features).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, toy_config, tmp_path):
    """Every parameter in the asked dtype; features may stay in float32."""
    make_model(toy_config).save_pretrained(tmp_path)
    model = LibraForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    ids, features = torch.tensor([make_rows(toy_config)[0]]), make_features(toy_config, 2)
    output = full(model, ids, features)
    assert output.logits.dtype == output.vision_logits.dtype == dtype
    exact = full(make_model(toy_config), ids, features)
    assert_same(output.vision_logits, exact.vision_logits, 0.3)
    assert_same(finite(output.logits), finite(exact.logits), 0.3)


def test_one_dtype_whatever_the_text_config_says():
    """The configuration of a base LLM names the dtype it was saved in."""
    model = LibraForCausalLM(make_config(text={"dtype": "bfloat16"}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_joint_distribution_of_a_half_precision_model(toy_config):
    """Log-probabilities of codes are summed in float32: bfloat16 would make many of them equal."""
    model = make_model(toy_config).to(torch.bfloat16)
    ids = torch.tensor([[1, 5, toy_config.boi_token_id]])
    step = full(model, ids, logits_to_keep=1)
    assert step.logits.dtype == torch.float32
    first, second = step.vision_logits[0].double().log_softmax(-1)
    expected = first[:6, None] + second[None, :6]
    assert_same(step.logits[0, 0, 50:86], expected.flatten(), 1e-5)


def test_names_of_parameters(toy_model):
    """Everything visual says so; the LLM's own parameters keep the LLM's names under one prefix."""
    bare = type(toy_model.model.language_model)(toy_model.config.text_config)
    ours = {name for name, _ in toy_model.named_parameters() if "vision" not in name and "visual" not in name}
    assert ours == {f"model.language_model.{name}" for name, _ in bare.named_parameters()} | {"lm_head.weight"}


@pytest.mark.parametrize("use_bridge", [True, False])
def test_fresh_weights(use_bridge):
    """A fresh bridge adds nothing, and a fresh low-rank map has the spread of the dense matrix it stands for."""
    text = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = LibraForCausalLM(make_config(text=text, use_bridge=use_bridge))
    layer = model.model.vision_model.layers[0]
    attention = layer.self_attn
    for low_rank in (attention.q_proj, attention.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
        dense = low_rank.B.weight @ low_rank.A.weight
        assert dense.std().item() == pytest.approx(model.config.text_config.initializer_range, rel=0.1)
    bridges = {name: p for name, p in attention.named_parameters() if "bridge" in name}
    assert len(bridges) == (8 if use_bridge else 0)
    for name, parameter in bridges.items():
        assert parameter.any() == name.endswith(".A.weight"), name


def test_a_missing_bridge_loads_as_zero(tmp_path):
    """Weights without a bridge, loaded into a model with one, compute what they did."""
    without = make_model(make_config(use_bridge=False))
    without.save_pretrained(tmp_path)
    config = make_config(use_bridge=True)
    model, report = LibraForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert len(report["missing_keys"]) == 2 * 8
    ids, features = torch.tensor([make_rows(config)[0]]), make_features(config, 2)
    assert_same(full(model, ids, features).logits, full(without, ids, features).logits, 1e-5)


def test_a_new_bridge_matters_once_trained():
    config = make_config()
    model, ids = make_model(config), torch.tensor([[1, 5, *make_image(config), NEWLINE, 7]])
    with_bridge = full(model, ids).logits
    for name, parameter in model.named_parameters():
        if "bridge" in name and name.endswith("B.weight"):
            parameter.data.zero_()
    assert not torch.allclose(with_bridge[:, -1], full(model, ids).logits[:, -1], atol=1e-2)
    assert torch.equal(with_bridge[:, :2], full(model, ids).logits[:, :2])


def test_randomize_leaves_no_parameter_at_zero():
    for name, parameter in randomize(LibraForCausalLM(make_config("llama_biased"))).named_parameters():
        assert parameter.abs().min() > 0, name
