"""Text through Libra is, bit for bit, text through the bare language model it was built on."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.modeling.toys import FAMILIES_AND_KERNELS, NEWLINE, make_config, make_image, make_model, pad, randomize

ROWS = [[1, 5, 9, 33, 12, 40, 21, 8, 7], [1, 44, 3], [1, 6, 6, 6, 17, 25]]


@pytest.fixture(params=FAMILIES_AND_KERNELS, ids="-".join)
def twins(request):
    """A Libra model and the bare LLM with the same weights."""
    family, attention = request.param
    libra = make_model(make_config(family), attention)
    bare = AutoModelForCausalLM.from_config(libra.config.text_config, attn_implementation=attention).eval()
    randomize(bare, seed=3)
    libra.model.language_model.load_state_dict(bare.model.state_dict())
    libra.lm_head.load_state_dict(bare.lm_head.state_dict())
    return libra, bare


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits(twins, side, use_cache):
    libra, bare = twins
    input_ids, mask = pad(ROWS, side)
    with torch.no_grad():
        ours = libra(input_ids=input_ids, attention_mask=mask, use_cache=use_cache)
        expected = bare(input_ids=input_ids, attention_mask=mask, use_cache=use_cache)
    assert torch.equal(ours.logits, expected.logits)
    assert ours.vision_logits is None


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"do_sample": False}, id="greedy"),
        pytest.param({"do_sample": False, "use_cache": False}, id="greedy-uncached"),
        pytest.param({"do_sample": True, "top_p": 0.9, "temperature": 1.5}, id="sampling"),
        pytest.param({"do_sample": False, "num_beams": 3, "num_return_sequences": 2}, id="beams"),
        pytest.param({"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2}, id="penalties"),
    ],
)
def test_generate(twins, how):
    libra, bare = twins
    input_ids, mask = pad(ROWS)
    answers = []
    for model in (libra, bare):
        torch.manual_seed(0)
        answers.append(model.generate(input_ids, attention_mask=mask, max_new_tokens=12, eos_token_id=4, **how))
    assert torch.equal(*answers)


def test_a_step_of_text_does_not_pay_for_the_vision_heads(toy_model, monkeypatch):
    monkeypatch.setattr(toy_model, "predict_codes", lambda rows: pytest.fail("the vision heads ran"))
    generated = toy_model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 6)


def test_training_gradients(toy_model, toy_config):
    """The loss and the LLM's gradients of a text batch are the bare LLM's."""
    bare = randomize(AutoModelForCausalLM.from_config(toy_config.text_config), seed=3)
    toy_model.model.language_model.load_state_dict(bare.model.state_dict())
    toy_model.lm_head.load_state_dict(bare.lm_head.state_dict())
    input_ids, mask = pad(ROWS, "right")
    labels = input_ids.masked_fill(mask == 0, -100)
    losses = [m.train()(input_ids=input_ids, attention_mask=mask, labels=labels).loss for m in (toy_model, bare)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    ours = dict(toy_model.model.language_model.named_parameters())
    for name, parameter in bare.model.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("with_image", [True, False])
def test_its_layers_are_called(toy_model, with_image):
    """Engines act on the call of a layer; whatever is in the batch, each is called once, and so is Libra's beside it."""
    called = []
    for layers in (toy_model.model.language_model.layers, toy_model.model.vision_model.layers):
        for layer in layers:
            layer.register_forward_hook(lambda module, *_: called.append(module))
    ids = torch.tensor([[1, 5, *([*make_image(toy_model.config), NEWLINE] if with_image else []), 7]])
    toy_model(ids)
    pairs = zip(toy_model.model.vision_model.layers, toy_model.model.language_model.layers)
    assert called == [layer for pair in pairs for layer in pair]  # the LLM's around Libra's


def test_it_still_works_alone(toy_model):
    """Also after a copy, and from a file of the whole model: the layers are not tied to the model they were made in."""
    ids = torch.tensor([[1, 5, 7]])
    expected = toy_model.model(ids, use_cache=False).last_hidden_state
    for model in (toy_model, copy.deepcopy(toy_model), pickle.loads(pickle.dumps(toy_model))):
        alone = model.model.language_model
        assert torch.equal(alone(ids, use_cache=False).last_hidden_state, expected)
        assert alone.layers[0].forward.args[0] is alone.layers[0]
