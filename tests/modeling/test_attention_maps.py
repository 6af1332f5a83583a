"""Attention of answers on images: the weights of a plain forward, without its maps, and the measures of diversity."""

import pytest
import torch

from modeling_libra import LibraForCausalLM
from tests.modeling.toys import FAMILIES, NEWLINE, assert_same, make_config, make_features, make_image, make_model, pad

ANSWER = [44, 7, 21]
MODELS = {family: make_model(make_config(family)) for family in FAMILIES}
MODELS["no_bridge"] = make_model(make_config(use_bridge=False))


def make_prompt(config):
    """Two images and text around them."""
    return [1, 5, *make_image(config, 0), NEWLINE, 21, 22, *make_image(config, 1), NEWLINE, 31]


def plain_maps(model, inputs, answer, image_index, features=None):
    """The same weights from a forward of everything at once, with all its maps."""
    config = model.config
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(1, len(answer), dtype=torch.long)], dim=1)
    features = inputs["image_features"] if features is None else features
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, image_features=features, use_cache=False, output_attentions=True)
    first = (ids[0] == config.boi_token_id).nonzero()[image_index] + 1
    last = inputs["input_ids"].shape[1] - 1
    maps = torch.stack(outputs.attentions, dim=1)[
        0, :, :, last : last + len(answer), first : first + config.num_patches
    ]
    return maps.permute(2, 0, 1, 3)  # (tokens, layers, heads, patches)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("image_index", [0, 1])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_a_plain_forward(name, padding, image_index, attention):
    model = MODELS[name]
    ids = torch.tensor([[0] * padding + make_prompt(model.config)])
    mask = torch.tensor([[0] * padding + [1] * (ids.shape[1] - padding)])
    inputs = {"input_ids": ids, "attention_mask": mask, "image_features": make_features(model.config, 2)}
    model.set_attn_implementation(attention)
    maps = model.attend_to_image(**inputs, answer_ids=torch.tensor(ANSWER), image_index=image_index)
    assert maps.shape == (3, 2, 4, 4)
    assert_same(maps, plain_maps(model, inputs, ANSWER, image_index), 1e-5)


def test_rows_of_a_batch_without_a_mask_and_answers_as_generated():
    model = MODELS["llama"]
    rows = [[1, *make_image(model.config, 2), NEWLINE, 41], make_prompt(model.config)]
    features = make_features(model.config, 3)
    ids, mask = pad(rows)
    batch = {"input_ids": ids[:1], "attention_mask": mask[:1], "image_features": features[:1]}
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, ids.shape[1] :]  # (1, 3)
    alone = model.attend_to_image(torch.tensor(rows[:1]), image_features=features[:1], answer_ids=answer)
    assert_same(model.attend_to_image(**batch, answer_ids=answer), alone, 1e-5)
    assert_same(alone, plain_maps(model, batch, answer[0].tolist(), 0), 1e-5)


def test_answer_that_is_an_image():
    model = MODELS["llama"]
    config = model.config
    inputs = {
        "input_ids": torch.tensor([[1, *make_image(config, 0), NEWLINE, 41]]),
        "attention_mask": torch.ones(1, config.num_patches + 5, dtype=torch.long),
        "image_features": make_features(config, 1),
    }
    answer = [*make_image(config, 3), NEWLINE, 42]
    zeros = torch.zeros_like(inputs["image_features"])
    expected = plain_maps(model, inputs, answer, 0, torch.cat([inputs["image_features"], zeros]))
    assert_same(model.attend_to_image(**inputs, answer_ids=answer), expected, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_text_are_recorded_once(family):
    model = MODELS[family]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([[1, 5, 6]]), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(1, 4, 3, 3)] * 2


def test_no_map_of_the_whole_prompt_is_made():
    model = make_model()
    found = []
    for layer in (*model.model.language_model.layers, *model.model.vision_model.layers):
        layer.self_attn.register_forward_hook(lambda module, args, output: found.append(output[1]))
    model.attend_to_image(torch.tensor([make_prompt(model.config)]), answer_ids=ANSWER)
    maps = [weights for weights in found if weights is not None]
    assert len(maps) == len(ANSWER) * 2
    assert all(weights.shape[:3] == (1, 4, 1) for weights in maps)


def test_attention_implementation_is_restored():
    model = make_model()
    model.set_attn_implementation({"": "eager", "text_config": "sdpa"})
    configs = model.config, model.config.text_config
    prompt = torch.tensor([make_prompt(model.config)])
    model.attend_to_image(prompt, answer_ids=ANSWER)
    assert [config._attn_implementation for config in configs] == ["eager", "sdpa"]
    with pytest.raises(ValueError, match="id -5"):  # an id that the table of embeddings does not have fails in a step
        model.attend_to_image(prompt, answer_ids=[44, -5, 3])
    assert [config._attn_implementation for config in configs] == ["eager", "sdpa"]


def test_refuses_what_has_no_map():
    model = make_model()
    config = model.config
    prompt = torch.tensor([make_prompt(config)])
    with pytest.raises(ValueError, match="one row"):
        model.attend_to_image(prompt.repeat(2, 1), answer_ids=ANSWER)
    with pytest.raises(ValueError, match="answer_ids is empty"):
        model.attend_to_image(prompt, answer_ids=[])
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"image_index is {index}, but the prompt has 2 whole images"):
            model.attend_to_image(prompt, answer_ids=ANSWER, image_index=index)
    with pytest.raises(ValueError, match="ends in EOI"):
        model.attend_to_image(torch.tensor([[1, *make_image(config)]]), answer_ids=ANSWER)
    mask = torch.ones_like(prompt)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        model.attend_to_image(prompt, mask, answer_ids=ANSWER)
    with pytest.raises(ValueError, match="1 images, but input_ids holds 2"):
        model.attend_to_image(prompt, image_features=make_features(config, 1), answer_ids=ANSWER)


MAPS = torch.tensor(
    [
        [[0.1, 0.3, 0.0], [0.3, 0.1, 0.0]],  # heads (1/4, 3/4, 0) and (3/4, 1/4, 0); their mean (1/2, 1/2, 0)
        [[0.2, 0.0, 0.2], [0.0, 0.0, 0.4]],  # (1/2, 0, 1/2) and (0, 0, 1); mean (1/4, 0, 3/4)
        [[0.01, 0.0, 0.03], [0.01, 0.0, 0.03]],  # both (1/4, 0, 3/4)
    ]
)
"""Three layers, two heads, three patches."""


def test_differences_computed_by_hand():
    cross = LibraForCausalLM.cross_layer_difference(MAPS)
    # |1/4 - 1/2| + |0 - 1/2| + |3/4 - 0| = 3/2, half of it; then none
    assert_same(cross, torch.tensor([0.75, 0.0]), 1e-6)
    inner = LibraForCausalLM.inner_layer_difference(MAPS)
    # |1/4 - 3/4| + |3/4 - 1/4| = 1, half of it; |1/2 - 0| + |1/2 - 1| = 1, half of it; none
    assert_same(inner, torch.tensor([0.5, 0.5, 0.0]), 1e-6)


def test_pairs_of_three_heads_and_leading_dimensions():
    one_hot = torch.eye(3)[[0, 1, 1]].expand(2, 5, 4, 3, 3)  # of the three pairs two have nothing in common
    assert_same(LibraForCausalLM.inner_layer_difference(one_hot), torch.full((2, 5, 4), 2 / 3), 1e-6)
    assert_same(LibraForCausalLM.cross_layer_difference(one_hot), torch.zeros(2, 5, 3), 1e-6)
    apart = torch.eye(2)[:, None].repeat(1, 3, 1)  # two layers, each looks at a patch of its own
    assert_same(LibraForCausalLM.cross_layer_difference(apart), torch.ones(1), 1e-6)


def test_differences_need_two_and_some_attention():
    with pytest.raises(ValueError, match="at least 2"):
        LibraForCausalLM.cross_layer_difference(MAPS[:1])
    with pytest.raises(ValueError, match="at least 2"):
        LibraForCausalLM.inner_layer_difference(MAPS[:, :1])
    for measure in (LibraForCausalLM.cross_layer_difference, LibraForCausalLM.inner_layer_difference):
        for nothing in (0.0, float("nan")):
            with pytest.raises(ValueError, match="zero on the whole image"):
                measure(MAPS * torch.tensor([1, 1, nothing])[:, None, None])
