"""Parity with the reference files of the language model: what the authors' release computes on the same weights."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from modeling_libra import LibraForCausalLM
from modeling_libra.conversion_libra import convert_config, convert_ids, convert_key, convert_state_dict
from tests.modeling.implementations import running
from tests.modeling.toys import assert_same

MODELS = ["lm", "lm_no_bridge"]
BATCHES = ["pretrain_batch", "interleaved_batch", "no_signal", "generate_text"]
ATTENTIONS = ["sdpa", "eager", "flex_attention", "flash_attention_2"]
TRAINING_BATCHES = ["pretrain_batch", "interleaved_batch"]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def load_released(folder) -> LibraForCausalLM:
    config = convert_config(json.loads((folder / "config.json").read_text()))
    weights = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        weights |= convert_state_dict(load_file(shard))
    model = LibraForCausalLM(config).eval()
    model.load_state_dict(weights, strict=True)
    return model


def load_batch(path, config) -> SimpleNamespace:
    """A reference batch: its tensors, and the inputs in our terms."""
    tensors = load_file(path)
    input_ids = convert_ids(tensors["input_ids"], config)
    is_code = (input_ids >= config.text_vocab_size) & (input_ids < config.boi_token_id)
    features = tensors["contiguous_signal"][is_code].view(-1, config.num_patches, config.feature_size)
    inputs = {"input_ids": input_ids, "attention_mask": tensors["attention_mask"], "image_features": features}
    if "position_ids" in tensors:
        inputs["position_ids"] = tensors["position_ids"]
    return SimpleNamespace(
        tensors=tensors,
        inputs=inputs,
        is_vision=input_ids >= config.text_vocab_size,
        keep=tensors["attention_mask"].bool(),
    )


@pytest.fixture(scope="module", params=[(name, attention) for name in MODELS for attention in ATTENTIONS], ids=str)
def released(request, golden):
    name, attention = request.param
    with running(load_released(golden / name), attention) as model:
        yield SimpleNamespace(folder=golden / name, model=model, attention=attention)


@pytest.fixture(scope="module", params=ATTENTIONS)
def official(request, golden):
    folder = golden / "official_checkpoint"
    with running(load_released(folder / "checkpoint"), request.param) as model:
        yield SimpleNamespace(model=model, batch=load_batch(folder / "expected.safetensors", model.config))


def assert_logits(output, batch, config):
    """Our two kinds of logits against the released array `(codebook, batch, length, V + entries)`."""
    text_size = config.text_vocab_size
    expected = batch.tensors["logits"]
    is_text = batch.keep & ~batch.is_vision
    assert_same(output.logits[is_text], expected[0, ..., :text_size][is_text])
    assert (output.logits[batch.is_vision] == float("-inf")).all()
    vision = expected[..., text_size:].permute(1, 2, 0, 3)[batch.is_vision]  # (vision rows, codebooks, entries)
    if len(vision):
        assert_same(output.vision_logits, vision)
    else:
        assert output.vision_logits is None


@pytest.mark.parametrize("name", BATCHES)
def test_forward(released, name):
    batch = load_batch(released.folder / f"{name}.safetensors", released.model.config)
    with torch.no_grad():
        output = released.model(**batch.inputs, output_hidden_states=True, use_cache=False)
    assert_logits(output, batch, released.model.config)
    assert_same(output.hidden_states[1][batch.keep], batch.tensors["hidden_1"][batch.keep])
    assert_same(output.hidden_states[-1][batch.keep], batch.tensors["hidden_last"][batch.keep])


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("model_name", MODELS)
def test_attention_weights(golden, model_name, name):
    model = load_released(golden / model_name)
    batch = load_batch(golden / model_name / f"{name}.safetensors", model.config)
    with running(model, "eager"), torch.no_grad():  # the others give no weights
        weights = model(**batch.inputs, output_attentions=True, use_cache=False).attentions[0]
    queries = batch.keep[:, None, :, None].expand_as(weights)
    assert_same(weights[queries], batch.tensors["attn_0"][queries])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", TRAINING_BATCHES)
def test_loss_and_gradients(released, name, mode):
    model = released.model
    batch = load_batch(released.folder / f"{name}.safetensors", model.config)
    labels = convert_ids(batch.tensors["labels"], model.config)
    model.zero_grad()
    has_gradients = released.attention != "flex_attention"  # it has no backward on the CPU
    try:
        with torch.set_grad_enabled(has_gradients):
            loss = model.train(mode == "train")(**batch.inputs, labels=labels).loss
    finally:
        model.eval()
    torch.testing.assert_close(loss, batch.tensors["loss"], rtol=1e-5, atol=0)
    if not has_gradients:
        return
    loss.backward()
    gradients = {key.removeprefix("grad."): g for key, g in batch.tensors.items() if key.startswith("grad.")}
    assert gradients
    parameters = dict(model.named_parameters())
    for key, expected in gradients.items():
        assert_same(parameters[convert_key(key)].grad, expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_with_left_padding(released, use_cache):
    config = released.model.config
    batch = load_batch(released.folder / "generate_text.safetensors", config)
    assert not batch.keep.all(), "the reference batch has left padding"
    del batch.inputs["position_ids"]
    expected = convert_ids(batch.tensors["generated"], config)
    new_tokens = expected.shape[1] - batch.keep.shape[1]
    generated = released.model.generate(**batch.inputs, max_new_tokens=new_tokens, use_cache=use_cache, **GREEDY)
    assert torch.equal(generated, expected)


def test_official_logits(official):
    with torch.no_grad():
        output = official.model(**official.batch.inputs)
    # The reference leaves positions to the mask; relative ones are the same.
    assert_logits(output, official.batch, official.model.config)


def test_official_features_belong_to_the_codes(official):
    assert_same(official.batch.inputs["image_features"], official.batch.tensors["clip_features"], 1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
def test_official_answers(official, use_cache):
    expected = convert_ids(official.batch.tensors["generated"], official.model.config)
    generated = official.model.generate(**official.batch.inputs, max_new_tokens=16, use_cache=use_cache, **GREEDY)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_official_text_to_image(official, use_cache):
    prompt, expected = (
        convert_ids(official.batch.tensors[f"t2i_{name}"], official.model.config) for name in ("input_ids", "generated")
    )
    new_tokens = expected.shape[1] - prompt.shape[1]
    generated = official.model.generate(prompt, max_new_tokens=new_tokens, use_cache=use_cache, **GREEDY)
    assert torch.equal(generated, expected)
