"""The switches of Table 3 that are fields of the configuration: what each takes away, and that nothing else changes.

That a model computes what the definition says with each of them is in `test_routing.py`, the vision system saved apart
in `test_vision_system.py`.
"""

import pytest
import torch

from modeling_libra import LibraConfig, LibraForCausalLM
from tests.modeling.toys import NEWLINE, assert_same, make_config, make_features, make_image, make_model, make_rows, pad

EXPERT = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp", "layernorm", "q_norm", "k_norm")
PARTS = {
    "use_bridge": lambda name: "bridge" in name,
    "use_expert": lambda name: "vision_model.layers" in name and any(part in name for part in EXPERT),
    "use_continuous_features": lambda name: ".embedding.norm." in name or ".embedding.proj." in name,
}
"""The parameters that go with each part."""


@pytest.fixture(params=PARTS)
def switch(request) -> str:
    return request.param


@pytest.fixture
def inputs():
    config = make_config()
    ids, mask = pad(make_rows(config), "right")
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "image_features": make_features(config, 3), "labels": labels}


@pytest.mark.parametrize("family", ["llama_biased", "qwen3"])
def test_a_part_that_is_off_has_no_parameters_and_all_others_stay(family, switch):
    whole, without = (LibraForCausalLM(make_config(family, **fields)) for fields in ({}, {switch: False}))
    expected = {name: p.shape for name, p in whole.named_parameters() if not PARTS[switch](name)}
    assert {name: p.shape for name, p in without.named_parameters()} == expected
    assert len(expected) < len(list(whole.parameters()))


def test_on_is_the_default_and_changes_nothing(switch, inputs):
    torch.manual_seed(0)
    default = LibraForCausalLM(make_config()).eval()
    torch.manual_seed(0)
    named = LibraForCausalLM(make_config(**{switch: True})).eval()
    assert default.state_dict().keys() == named.state_dict().keys()
    with torch.no_grad():
        mine, theirs = (model(**inputs) for model in (default, named))
    assert torch.equal(mine.loss, theirs.loss)
    assert torch.equal(mine.vision_logits, theirs.vision_logits)


def test_text_alone_is_the_same_without_any_part(switch):
    """The language model never depended on it."""
    whole, without = make_model(), make_model(make_config(**{switch: False}))
    without.load_state_dict(whole.state_dict(), strict=False)
    ids = torch.tensor([[1, 5, 9, 8, 3]])
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, without(ids).logits)


def test_images_are_not_the_same_without_a_part(switch, inputs):
    whole, without = make_model(), make_model(make_config(**{switch: False}))
    without.load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        mine, theirs = (model(**inputs) for model in (whole, without))
    assert not torch.allclose(mine.vision_logits, theirs.vision_logits, atol=1e-3)
    assert not torch.allclose(mine.loss, theirs.loss, atol=1e-3)


def test_saved_is_loaded(switch, inputs, tmp_path):
    model = make_model(make_config(**{switch: False}))
    model.save_pretrained(tmp_path)
    loaded, report = LibraForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert getattr(loaded.config, switch) is False
    assert getattr(LibraConfig.from_pretrained(tmp_path), switch) is False
    with torch.no_grad():
        mine, theirs = (m.eval()(**inputs) for m in (model, loaded))
    assert torch.equal(mine.loss, theirs.loss)
    assert torch.equal(mine.logits, theirs.logits)


def test_the_cache_and_the_uncached_forward_agree(switch):
    """An image, text, and a second image through the cache, token group by token group."""
    config = make_config(**{switch: False})
    model = make_model(config)
    row = [1, 5, *make_image(config, 0), NEWLINE, 21, 22, *make_image(config, 1), NEWLINE, 31]
    ids, features = torch.tensor([row]), make_features(config, 2)
    with torch.no_grad():
        expected = model.model(ids, image_features=features, use_cache=False).last_hidden_state
        first = model.model(ids[:, :10], image_features=features[:1], use_cache=True)
        rest = model.model(ids[:, 10:], image_features=features[1:], cache=first.get("cache") or first.past_key_values)
    assert_same(torch.cat([first.last_hidden_state, rest.last_hidden_state], dim=1), expected, 1e-5)


def test_every_parameter_that_is_left_is_trained(switch, inputs):
    model = make_model(make_config(**{switch: False})).train()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_text_batch_leaves_zeros_on_vision_parameters(switch):
    """Not None: DistributedDataParallel waits for every parameter."""
    model = make_model(make_config(**{switch: False})).train()
    ids = torch.tensor([[1, 5, 9, 8]])
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() == ("vision" not in name), name


def test_without_an_expert_vision_rows_meet_the_language_model():
    config = make_config(use_expert=False)
    model, ids = make_model(config), torch.tensor([make_image(config)])
    with torch.no_grad():
        before = model(ids).vision_logits
        model.model.language_model.layers[0].mlp.up_proj.weight.add_(0.1)
        assert not torch.allclose(before, model(ids).vision_logits, atol=1e-3)


def test_without_continuous_features_they_are_checked_and_not_read(inputs):
    model = make_model(make_config(use_continuous_features=False))
    with torch.no_grad():
        with_features = model(**inputs).vision_logits
        without = model(**inputs | {"image_features": None}).vision_logits
        assert torch.equal(with_features, without)
        with pytest.raises(ValueError, match="image_features holds 2 images"):
            model(**inputs | {"image_features": inputs["image_features"][:2]})
