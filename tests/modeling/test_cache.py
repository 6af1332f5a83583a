"""A cache of the bare LLM's size, from which the vision view is rebuilt: whatever is done to it, what follows is right."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.generation import CompileConfig

from modeling_libra import LibraForCausalLM
from modeling_libra.cache_libra import CACHE_NAME
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

MODELS = {family: make_model(make_config(family)) for family in FAMILIES}
MODEL = MODELS["llama"]
CONFIG = MODEL.config
PREFIX = [1, 5, *make_image(CONFIG, 0), NEWLINE, 21, 22]
SECOND = [*make_image(CONFIG, 1), NEWLINE, 31]


def run(model: LibraForCausalLM, ids, cache=None, features=None, **inputs) -> torch.Tensor:
    """Text logits and, on vision rows, those of the vision heads: `(batch, length, V)`, `(vision rows, 2, size)`."""
    ids = torch.tensor([ids]) if isinstance(ids, list) else ids
    if features is not None:
        inputs["image_features"] = features
    with torch.no_grad():
        return model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=cache is not None, **inputs)


def assert_continues(model, cache, past: list[list[int]], more: list[int], features=None):
    """`more`, which holds an image, through the cache: the logits of the whole rows at once."""
    outputs = run(model, torch.tensor([more] * len(past)), cache)
    vision = []
    for row, actual in zip(past, outputs.logits, strict=True):
        blank = None if features is None else torch.zeros_like(features)
        expected = run(model, [*row, *more], features=None if features is None else torch.cat([features, blank]))
        assert_same(actual, expected.logits[0, len(row) :])
        vision.append(expected.vision_logits[-sum(token >= CONFIG.text_vocab_size for token in more) :])
    assert_same(outputs.vision_logits, torch.cat(vision))


def cache_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_size():
    """The language view, `2 * bridge_rank` numbers for each token and layer, and 8 bytes for each token."""
    bare = AutoModelForCausalLM.from_config(CONFIG.text_config).eval()
    theirs = cache_bytes(run(bare, [7] * len(PREFIX), DynamicCache(config=CONFIG))[CACHE_NAME])
    ours = cache_bytes(run(MODEL, PREFIX, DynamicCache(config=CONFIG), make_features(CONFIG, 1))[CACHE_NAME])
    assert ours == theirs + len(PREFIX) * (2 * 2 * CONFIG.bridge_rank * 4 + 8)


def test_size_without_a_bridge():
    model = make_model(make_config(use_bridge=False))
    cache = run(model, PREFIX, DynamicCache(config=model.config))[CACHE_NAME]
    assert len(cache.layers) == 2
    assert_continues(model, cache, [PREFIX], SECOND)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_view_is_what_a_plain_cache_holds(family):
    """Text rows have the bare LLM's keys and values; at any time the first layers are a cache of the bare LLM's shape."""
    model = MODELS[family]
    cache = run(model, [1, 5, 9, 8], DynamicCache())[CACHE_NAME]
    expected = DynamicCache()
    with torch.no_grad():
        model.model.language_model(input_ids=torch.tensor([[1, 5, 9, 8]]), **{CACHE_NAME: expected})
    for ours, theirs in zip(cache.layers[: len(expected.layers)], expected.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [PREFIX, [1, 5, 6, 7, 8], [1]], ids=["image", "text", "one token"])
def test_a_later_image(family, first):
    cache = DynamicCache(config=MODELS[family].config)
    run(MODELS[family], first, cache)
    assert_continues(MODELS[family], cache, [first], SECOND)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_after_generated_text(family):
    """Tokens that were decoded one by one left their latents, too."""
    model, cache = MODELS[family], DynamicCache(config=MODELS[family].config)
    row = model.generate(torch.tensor([PREFIX]), **{CACHE_NAME: cache}, do_sample=False, max_new_tokens=5)[0].tolist()
    assert_continues(model, cache, [row[:-1]], [row[-1], *SECOND])


def test_crop():
    cache = DynamicCache(config=CONFIG)
    run(MODEL, [*PREFIX, *make_image(CONFIG, 7), NEWLINE, 40, 41], cache)
    cache.crop(-(CONFIG.num_patches + 5))
    assert cache.get_seq_length() == len(PREFIX)
    assert_continues(MODEL, cache, [PREFIX], SECOND)


def test_reordered_and_repeated_rows():
    other = [*PREFIX[:-1], 45]
    cache = DynamicCache(config=CONFIG)
    run(MODEL, torch.tensor([PREFIX, other]), cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    assert_continues(MODEL, cache, [other, other, PREFIX], SECOND)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, max_cache_len=40)])
@pytest.mark.parametrize("family", FAMILIES)
def test_reset(family, make):
    """A cache that is used again has forgotten everything."""
    model = MODELS[family]
    cache = make(config=model.config)
    run(model, [1, 9, 9, *make_image(CONFIG, 5), NEWLINE, 9, 9, 9, 9, 9], cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    run(model, PREFIX, cache)
    assert_continues(model, cache, [PREFIX], SECOND)


@pytest.mark.parametrize("family", FAMILIES)
def test_static(family):
    cache = StaticCache(MODELS[family].config, max_cache_len=40)
    run(MODELS[family], PREFIX, cache)
    sizes = [layer.keys.shape for layer in cache.layers]
    assert_continues(MODELS[family], cache, [PREFIX], SECOND)
    assert [layer.keys.shape for layer in cache.layers] == sizes


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no backend without extras"
)
def test_quantized():
    """The language view loses what 8 bits lose (here a sixth of the logits' spread), the latents lose nothing."""
    cache = QuantizedCache("fp8", CONFIG)
    run(MODEL, PREFIX, cache)
    exact = run(MODEL, [*PREFIX, *SECOND]).logits[0, len(PREFIX) :]
    continued = run(MODEL, SECOND, cache).logits[0]
    difference = (continued - exact)[exact.isfinite()]
    assert 0 < difference.std() < 0.25 * exact[exact.isfinite()].std()


def test_padded_chat_with_a_later_image():
    """Left padding, an answer, and a turn with an image for all rows."""
    rows = make_rows(CONFIG)
    (ids, mask), features = pad(rows), make_features(CONFIG, 3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=CONFIG)
    run(MODEL, ids, cache, features, attention_mask=mask, position_ids=positions)
    turn = torch.tensor([SECOND] * 3)
    longer = torch.nn.functional.pad(mask, (0, len(SECOND)), value=1)
    later = make_features(CONFIG, 3, seed=9)
    positions = (longer.cumsum(1) - 1)[:, -len(SECOND) :]
    outputs = run(MODEL, turn, cache, later, attention_mask=longer, position_ids=positions)
    for row, own, new, actual in zip(rows, features.split([2, 0, 1]), later, outputs.logits, strict=True):
        expected = run(MODEL, [*row, *SECOND], features=torch.cat([own, new[None]])).logits[0, len(row) :]
        assert_same(actual, expected)


def test_beams_read_and_write_images():
    """Beam search reorders the cache at every step; without a cache there is nothing to reorder."""
    prompt = torch.tensor([[1, *make_image(CONFIG, 1), NEWLINE, 5, CONFIG.boi_token_id]])
    how = {"image_features": make_features(CONFIG, 1), "num_beams": 3, "max_new_tokens": 9, "do_sample": False}
    cached, uncached = (MODEL.generate(prompt, **how, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


def test_a_cache_of_the_bare_language_model_is_refused():
    cache = DynamicCache()
    with torch.no_grad():
        MODEL.model.language_model(input_ids=torch.tensor([[1, 5, 9]]), **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="holds 3 tokens, but the bridge's latents of 0"):
        run(MODEL, SECOND, cache)


class TestCompiled:
    """Text decoding with a static cache, compiled as one graph."""

    PROMPT = torch.tensor([PREFIX])

    @pytest.fixture(scope="class")
    def compiled(self):
        return torch.compile(MODEL, fullgraph=True, backend="aot_eager")

    def decode(self, forward):
        cache = StaticCache(CONFIG, max_cache_len=40)
        run(MODEL, PREFIX, cache, make_features(CONFIG, 1))
        steps = [run(forward, [token], cache, logits_to_keep=1).logits for token in (5, 9, 33)]
        return torch.stack(steps), cache

    def test_steps(self, compiled):
        assert_same(self.decode(compiled)[0], self.decode(MODEL)[0], 1e-5)

    def test_an_image_after_compiled_steps(self, compiled):
        cache = self.decode(compiled)[1]
        assert_continues(MODEL, cache, [[*PREFIX, 5, 9, 33]], SECOND, make_features(CONFIG, 1))

    def test_image_tokens_are_not_taken_for_text(self, compiled):
        cache = self.decode(compiled)[1]
        with pytest.raises((RuntimeError, IndexError)):
            run(compiled, [CONFIG.boi_token_id], cache, logits_to_keep=1)

    @pytest.mark.parametrize("draws", [False, True], ids=["text", "an image, then text"])
    def test_generate(self, draws):
        """Steps that see image tokens run uncompiled in between."""
        compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        compile_config._compile_all_devices = True
        prompt = torch.tensor([[*PREFIX, CONFIG.boi_token_id]]) if draws else self.PROMPT
        how = {"image_features": make_features(CONFIG, 1), "do_sample": False, "max_new_tokens": 12}
        expected = MODEL.generate(prompt, **how)
        actual = MODEL.generate(prompt, **how, cache_implementation="static", compile_config=compile_config)
        assert torch.equal(actual, expected)


def test_wrong_input_leaves_the_cache_as_it_was():
    """A refused turn does not cost the conversation."""
    cache = DynamicCache(config=CONFIG)
    run(MODEL, PREFIX, cache)
    with pytest.raises(ValueError, match="broken image block"):
        run(MODEL, [*SECOND[:3], 7], cache)
    with pytest.raises(ValueError, match="broken image block"):
        run(MODEL, SECOND[1:], cache)  # codes after text
    with pytest.raises(ValueError, match="has id 1000"):
        run(MODEL, [1000], cache)
    with pytest.raises(ValueError, match="image_features holds 2 images"):
        run(MODEL, SECOND, cache, make_features(CONFIG, 2))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        run(MODEL, SECOND, cache, attention_mask=torch.ones(1, len(SECOND)))
    assert_continues(MODEL, cache, [PREFIX], SECOND)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_a_cache(name):
    """transformers 5.24 renamed it; callers of either time are understood."""
    cache = DynamicCache(config=CONFIG)
    first = MODEL(input_ids=torch.tensor([PREFIX]), **{name: cache}, use_cache=True)
    assert first[CACHE_NAME] is cache
    assert first.past_key_values is cache
    assert cache.get_seq_length() == len(PREFIX)
    assert MODEL.model(input_ids=torch.tensor([SECOND]), **{name: cache}, use_cache=True)[CACHE_NAME] is cache


def test_a_cache_under_both_names_is_refused():
    cache = DynamicCache(config=CONFIG)
    with pytest.raises(ValueError, match="two names of one thing"):
        MODEL(input_ids=torch.tensor([PREFIX]), cache=cache, past_key_values=cache)


@pytest.mark.parametrize(
    "make", [lambda: DynamicCache(config=CONFIG), lambda: StaticCache(config=CONFIG, max_cache_len=40)]
)
@pytest.mark.parametrize("length", range(1, CONFIG.num_patches + 2))
def test_an_image_is_whole_across_the_cache(make, length):
    """However much of an image is in the cache, the rest of it may follow, and nothing else."""
    image = make_image(CONFIG, 3)
    head, rest = [*PREFIX, *image[:length]], image[length:]
    wrongs = ([9, 9], [*rest[:-1], 9, 9], [*rest[:1], *rest], [*rest, rest[0]])
    for wrong in wrongs:
        cache = make()
        run(MODEL, head, cache)
        with pytest.raises(ValueError, match="broken image block"):
            run(MODEL, wrong, cache)
    cache = make()
    run(MODEL, head, cache)
    assert_continues(MODEL, cache, [head], [*rest, 9])
