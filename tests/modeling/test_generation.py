"""`generate()` writing text and images: every strategy, with images in the prompt, in batches, through any cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.generation.streamers import BaseStreamer

from modeling_libra.cache_libra import CACHE_NAME
from modeling_libra.generation_libra import LibraImageGrammar, cut_between_images
from modeling_libra.image_blocks_libra import check_image_blocks
from tests.modeling.toys import (
    FAMILIES,
    NEWLINE,
    assert_same,
    make_config,
    make_features,
    make_image,
    make_model,
    pad,
)

CONFIG = make_config()
MODEL = make_model(CONFIG)
V, BOI, EOI, PATCHES = CONFIG.text_vocab_size, CONFIG.boi_token_id, CONFIG.eoi_token_id, CONFIG.num_patches
GREEDY = {"do_sample": False, "max_new_tokens": 9}
# A prompt of each kind, and how many images with features it holds.
PROMPTS = {
    "text": ([1, 5, 7], 0),
    "image, then text": ([1, *make_image(CONFIG, 0), NEWLINE, 9], 1),
    "image to write": ([1, 5, 8, BOI], 0),
    "image, then one to write": ([1, *make_image(CONFIG, 1), NEWLINE, 5, BOI], 1),
    "two images, then text": ([1, *make_image(CONFIG, 2), NEWLINE, *make_image(CONFIG, 3), NEWLINE, 6], 2),
    "half an image": ([1, 5, *make_image(CONFIG, 4)[:3]], 0),
    "all codes": ([1, *make_image(CONFIG, 5)[:-1]], 0),
    "image": ([1, 5, *make_image(CONFIG, 6)], 1),
}


def prompt_inputs(names, side="left"):
    """The inputs of a batch of prompts, with the features of each row alone."""
    rows, counts = zip(*(PROMPTS[name] for name in names))
    input_ids, mask = pad(list(rows), side)
    per_row = [make_features(CONFIG, count, seed) for seed, count in enumerate(counts)]
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if sum(counts):
        inputs["image_features"] = torch.cat(per_row)
    return inputs, per_row


def assert_grammar(generated, prompt_length):
    """Whole images, "\\n" after each, and no image that text began by itself."""
    check_image_blocks(generated, CONFIG)
    for row in generated.tolist():
        for place in range(prompt_length, len(row)):
            assert row[place] != BOI
            assert (row[place - 1] != EOI) or row[place] == NEWLINE


@settings(max_examples=15)
@given(
    names=st.lists(st.sampled_from(sorted(PROMPTS)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    how=st.sampled_from(
        [
            {"temperature": 5.0},
            {"top_k": 3},
            {"top_p": 0.8},
            {"repetition_penalty": 3.0},
            {"no_repeat_ngram_size": 2},
            {"bad_words_ids": [[7], [8, 9], [V + 3]]},
            {"sequence_bias": {(NEWLINE,): -20.0, (EOI,): 20.0, (6,): 20.0}},
            {"num_return_sequences": 2},
            {"use_cache": False},
        ]
    ),
)
def test_grammar_always_holds(names, seed, how):
    inputs, _ = prompt_inputs(names)
    torch.manual_seed(seed)
    generated = MODEL.generate(**inputs, do_sample=True, max_new_tokens=10, **how)
    assert_grammar(generated, inputs["input_ids"].shape[1])


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"do_sample": False}], ids=str)
def test_grammar_of_beams(how):
    inputs, _ = prompt_inputs(PROMPTS)
    torch.manual_seed(0)
    assert_grammar(MODEL.generate(**inputs, max_new_tokens=10, **how), inputs["input_ids"].shape[1])


@pytest.mark.parametrize("written", range(PATCHES + 1))
def test_an_image_ends_exactly(written):
    """After k of its codes an image gets the rest, EOI, and the newline."""
    prompt = torch.tensor([[1, *make_image(CONFIG)[: written + 1]]])
    new = MODEL.generate(prompt, **GREEDY)[0, prompt.shape[1] :].tolist()
    codes = PATCHES - written
    assert all(V <= token < BOI for token in new[:codes])
    assert new[codes : codes + 2] == [EOI, NEWLINE]
    assert all(token < V for token in new[codes + 2 :])


@pytest.mark.parametrize(
    ("family", "num_beams", "use_cache"),
    [*((family, 1, True) for family in FAMILIES), ("mistral", 3, True), ("llama", 3, True), ("llama", 3, False)],
)
def test_batched_is_single(family, num_beams, use_cache):
    """Rows that write an image and rows that write text, several images a row: each as if it were alone."""
    model = make_model(make_config(family))
    how = {**GREEDY, "num_beams": num_beams, "use_cache": use_cache}
    inputs, per_row = prompt_inputs(PROMPTS)
    length = inputs["input_ids"].shape[1]
    batched = model.generate(**inputs, **how)[:, length:]
    for (row, count), features, new in zip(PROMPTS.values(), per_row, batched, strict=True):
        image_features = features if count else None
        single = model.generate(torch.tensor([row]), image_features=image_features, **how)[0, len(row) :]
        assert torch.equal(new, single)


def test_beams_find_the_best_sequence():
    """As many beams as codes search the last two codes of an image exhaustively."""
    prompt = [1, 5, *make_image(CONFIG)[: PATCHES - 1]]
    codes = torch.arange(V, BOI)
    with torch.no_grad():
        first = MODEL(torch.tensor([prompt]), logits_to_keep=1).logits[0, 0].log_softmax(-1)[codes]
        continued = torch.cat([torch.tensor(prompt).repeat(len(codes), 1), codes[:, None]], dim=1)
        second = MODEL(continued, logits_to_keep=1).logits[:, 0].log_softmax(-1)[:, codes]
    best = int((first[:, None] + second).argmax())
    found = MODEL.generate(torch.tensor([prompt]), num_beams=len(codes), do_sample=False, max_new_tokens=2)
    assert found[0, -2:].tolist() == [V + best // len(codes), V + best % len(codes)]


@pytest.mark.parametrize(
    "how", [{"num_beams": 4, "do_sample": False}, {"do_sample": True, "top_k": 1}], ids=["beams", "sampling"]
)
def test_several_sequences_a_row(how):
    """The first (with top-k 1: each) sequence of a row is what the row gives by itself."""
    inputs, per_row = prompt_inputs(PROMPTS)
    generated = MODEL.generate(**inputs, max_new_tokens=6, num_return_sequences=3, **how)
    assert generated.shape[0] == 3 * len(PROMPTS)
    for i, ((row, count), features) in enumerate(zip(PROMPTS.values(), per_row, strict=True)):
        image_features = features if count else None
        single = MODEL.generate(torch.tensor([row]), image_features=image_features, max_new_tokens=6, **how)
        ours = generated[3 * i : 3 * i + 3, -6:]
        assert torch.equal(ours[0], single[0, -6:])
        assert how["do_sample"] is False or torch.equal(ours, ours[:1].expand(3, -1))


def test_features_matter():
    inputs, _ = prompt_inputs(["image, then one to write"])
    with_features = MODEL.generate(**inputs, **GREEDY)
    del inputs["image_features"]
    assert not torch.equal(with_features, MODEL.generate(**inputs, **GREEDY))


def joint_by_hand(prompt):
    """p(code) = p1(id1) p2(id2), renormalised over the codes, as a list over flat codes."""
    with torch.no_grad():
        first, second = MODEL(torch.tensor([prompt])).vision_logits[-1].double().softmax(-1).tolist()
    joint = torch.tensor([first[id1] * second[id2] for id1 in range(6) for id2 in range(6)])
    return joint / joint.sum()


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        pytest.param({}, lambda p: p > 0, id="all codes"),
        pytest.param({"top_k": 5}, lambda p: p >= p.sort(descending=True).values[4], id="top-k"),
        pytest.param(
            {"top_p": 0.6},
            lambda p: torch.tensor([float(p[p > one].sum()) < 0.6 for one in p]),
            id="top-p",
        ),
    ],
)
def test_sampling_acts_on_the_joint_distribution(how, kept):
    prompt = PROMPTS["image to write"][0]
    joint = joint_by_hand(prompt)
    step = MODEL.generate(
        torch.tensor([prompt]),
        do_sample=True,
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
        **{"top_k": 0, **how},
    )
    expected = joint.where(kept(joint), 0.0)
    probabilities = step.scores[0][0].softmax(-1)
    assert_same(probabilities[V:BOI], expected / expected.sum(), 1e-5)
    assert probabilities[:V].sum() == probabilities[BOI:].sum() == 0


def test_temperature_flattens_the_joint_distribution():
    prompt = PROMPTS["image to write"][0]
    joint = joint_by_hand(prompt).sqrt()
    step = MODEL.generate(
        torch.tensor([prompt]), do_sample=True, temperature=2.0, top_k=0, max_new_tokens=1,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert_same(step.scores[0][0].softmax(-1)[V:BOI], joint / joint.sum(), 1e-5)


def test_scores_and_logits_are_returned():
    inputs, _ = prompt_inputs(["image, then one to write", "text"])
    output = MODEL.generate(
        **inputs, **GREEDY, output_scores=True, output_logits=True, output_attentions=True, return_dict_in_generate=True
    )
    # While a row is in its image all rows share the width of the flat ids; then text is text again.
    assert [step.shape[1] for step in output.scores] == [CONFIG.total_vocab_size] * (PATCHES + 2) + [V] * 3
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(torch.stack([step.argmax(-1) for step in output.scores], dim=1), new)
    by_hand = [[step.log_softmax(-1)[row, id] for step, id in zip(output.scores, new[row])] for row in range(2)]
    computed = MODEL.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert_same(computed, torch.tensor(by_hand), 1e-6)


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("normalize", [False, True])
def test_transition_scores_of_text_are_those_of_transformers(beams, normalize):
    inputs, _ = prompt_inputs(["text", "image, then text"])
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    output = MODEL.generate(**inputs, **options, **beams)
    asked = (output.sequences, output.scores, output.get("beam_indices"), normalize)
    theirs = GenerationMixin.compute_transition_scores(MODEL, *asked)
    assert_same(MODEL.compute_transition_scores(*asked), theirs, 1e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static", "implementation"])
@pytest.mark.parametrize("name", ["image, then one to write", "two images, then text"])
def test_caches(name, cache):
    inputs, _ = prompt_inputs([name, "text"])
    chosen = {
        "dynamic": lambda: {CACHE_NAME: DynamicCache(config=CONFIG)},
        "static": lambda: {CACHE_NAME: StaticCache(config=CONFIG, max_cache_len=40)},
        "implementation": lambda: {"cache_implementation": "static", "disable_compile": True},
    }[cache]()
    assert torch.equal(MODEL.generate(**inputs, **GREEDY, **chosen), MODEL.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
def test_uncached_with_an_image_read_and_one_written(family):
    """Without a cache every step sees the finished image again; only the prompt's has features."""
    model = make_model(make_config(family))
    inputs, _ = prompt_inputs(["image, then one to write", "two images, then text", "half an image"])
    cached = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert (cached[0] == EOI).sum() == 2
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=12, use_cache=False), cached)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_turn_with_an_image_through_the_cache(family):
    """A chat goes on from its cache; the new turn brings an image to one of the rows."""
    model = make_model(make_config(family))
    inputs, _ = prompt_inputs(["image, then text", "text"])
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn = [31, *make_image(CONFIG, 7), NEWLINE, 32], [*range(33, 33 + PATCHES + 4), 34]
    input_ids = torch.cat([first.sequences, torch.tensor(turn)], dim=1)
    mask = torch.nn.functional.pad(
        inputs["attention_mask"], (0, input_ids.shape[1] - inputs["input_ids"].shape[1]), value=1
    )
    features = torch.cat([inputs["image_features"], make_features(CONFIG, 1, 5)])

    def logits(image_features, **cache):
        again = {"input_ids": input_ids, "attention_mask": mask, "image_features": image_features, **GREEDY, **cache}
        return torch.stack(model.generate(**again, output_logits=True, return_dict_in_generate=True).logits)

    expected = logits(features)
    assert not torch.allclose(logits(torch.zeros_like(features)), expected, atol=1e-2)
    assert_same(logits(features, **{CACHE_NAME: first[CACHE_NAME]}), expected)


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("name", PROMPTS)
def test_a_streamer_gets_every_token(name):
    streamer = Collector()
    inputs, _ = prompt_inputs([name])
    generated = MODEL.generate(**inputs, **GREEDY, streamer=streamer)
    assert streamer.tokens == generated[0].tolist()
    assert streamer.ended


def test_eos_ends_a_row_and_pads_it():
    inputs, _ = prompt_inputs(["image, then one to write", "text"])
    endless = MODEL.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    eos = int(endless[1, 2])
    new = MODEL.generate(**inputs, **GREEDY, eos_token_id=eos)[:, inputs["input_ids"].shape[1] :]
    end = endless[1].tolist().index(eos) + 1
    assert torch.equal(new[1, :end], endless[1, :end])
    assert (new[1, end:] == 0).all()
    assert torch.equal(new[0, : PATCHES + 2], endless[0, : PATCHES + 2])


def test_eoi_may_end_generation():
    inputs, _ = prompt_inputs(["image to write", "half an image"])
    new = MODEL.generate(**inputs, **GREEDY, eos_token_id=EOI)[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row.index(EOI) for row in new] == [PATCHES, PATCHES - 2]
    assert new[1][PATCHES - 1 :] == [0, 0]


def test_generation_config_comes_from_the_language_model():
    generation_config = make_model(make_config(text={"eos_token_id": 2})).generation_config
    assert (generation_config.bos_token_id, generation_config.eos_token_id, generation_config.pad_token_id) == (1, 2, 0)


def test_text_ids_never_follow_from_the_vision_part_of_a_step():
    """Grammar on scores by hand: a row in text, one after BOI, one after the last code, one after EOI."""
    rows = [[1, 5, 7], [1, 5, BOI], [1, *make_image(CONFIG)[:-1]], [1, *make_image(CONFIG)]]
    ids, _ = pad(rows)
    scores = LibraImageGrammar(CONFIG)(ids, torch.zeros(4, CONFIG.total_vocab_size))
    possible = [row.isfinite().nonzero().squeeze(1).tolist() for row in scores]
    assert possible == [list(range(CONFIG.total_vocab_size)), list(range(V, BOI)), [EOI], [NEWLINE]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_features(count):
    inputs, _ = prompt_inputs(["two images, then text", "text"])
    inputs["image_features"] = make_features(CONFIG, count)
    with pytest.raises(ValueError, match=rf"holds {count} images, but input_ids holds \[2, 0\] whole image"):
        MODEL.generate(**inputs, **GREEDY)


def test_broken_prompt():
    with pytest.raises(ValueError, match="Row 0 of input_ids has a broken image block at position 3"):
        MODEL.generate(torch.tensor([[1, BOI, V, 5]]), **GREEDY)


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
@pytest.mark.parametrize("names", [["image, then text"], ["two images, then text", "text", "half an image"]], ids=len)
def test_chunked_prefill(names, chunk_size):
    """Images go into a chunk whole, with their features; what is generated is that of one prefill."""
    inputs, _ = prompt_inputs(names)
    expected = MODEL.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    chunked = MODEL.generate(
        **inputs, **GREEDY, prefill_chunk_size=chunk_size, output_logits=True, return_dict_in_generate=True
    )
    for step, expected_step in zip(chunked.logits, expected.logits, strict=True):
        assert_same(step, expected_step)
    del inputs["image_features"]
    without = MODEL.generate(**inputs, **GREEDY)
    assert torch.equal(MODEL.generate(**inputs, **GREEDY, prefill_chunk_size=chunk_size), without)


def test_cuts_between_images():
    rows = [[1, 5, *make_image(CONFIG), NEWLINE, 7, 8], [1, 5, 6, 7, *make_image(CONFIG), NEWLINE]]
    assert cut_between_images(torch.tensor(rows), 2, 0, CONFIG) == [2, 10, 11]
    assert cut_between_images(torch.tensor(rows), 4, 1, CONFIG) == [10, 11]


def test_assisted_generation_is_refused():
    with pytest.raises(ValueError, match="no assisted generation"):
        MODEL.generate(torch.tensor([[1, 5]]), **GREEDY, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("sample", [False, True])
def test_an_image_goes_on_where_everything_else_is_forbidden(sample):
    """A forced end of text has to wait for the end of the image."""
    inputs, _ = prompt_inputs(["image to write"])
    torch.manual_seed(0)
    generated = MODEL.generate(**inputs, do_sample=sample, max_new_tokens=2, forced_eos_token_id=2)
    assert_grammar(generated, inputs["input_ids"].shape[1])
    if not sample:
        assert torch.equal(generated, MODEL.generate(**inputs, do_sample=False, max_new_tokens=2))


@pytest.mark.parametrize("how", [{"encoder_repetition_penalty": 1.5}, {"encoder_no_repeat_ngram_size": 2}], ids=str)
def test_processors_that_read_the_prompt(how):
    inputs, _ = prompt_inputs(PROMPTS)
    assert_grammar(MODEL.generate(**inputs, **GREEDY, **how), inputs["input_ids"].shape[1])


def test_guidance_is_refused():
    inputs, _ = prompt_inputs(["image to write"])
    with pytest.raises(ValueError, match="no guidance"):
        MODEL.generate(**inputs, **GREEDY, guidance_scale=2.0)


def test_features_are_not_lost_behind_a_cut_cache():
    inputs, _ = prompt_inputs(["image, then text"])
    cache = DynamicCache(config=CONFIG)
    MODEL(input_ids=inputs["input_ids"][:, :4], **{CACHE_NAME: cache}, use_cache=True)
    with pytest.raises(ValueError, match="cache ends inside an image of rows"):
        MODEL.generate(**inputs, **GREEDY, **{CACHE_NAME: cache})
