"""What trainers rely on: gradients on every parameter, checkpointing, autocast, adapters, and TRL's way to the loss."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.modeling.toys import (
    NEWLINE,
    assert_same,
    make_config,
    make_features,
    make_image,
    make_model,
    make_rows,
    pad,
)


@pytest.fixture
def batch(toy_config):
    input_ids, mask = pad(make_rows(toy_config), "right")
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "image_features": make_features(toy_config, 3),
        "labels": input_ids.masked_fill(mask == 0, -100),
    }


@pytest.fixture
def text_batch():
    input_ids, mask = pad([[1, 5, 9, 8], [1, 7]], "right")
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": input_ids.masked_fill(mask == 0, -100),
    }


def gradients(model, batch):
    model.train().zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_every_parameter_is_trained(toy_model, batch):
    for name, gradient in gradients(toy_model, batch).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


def test_a_text_batch_leaves_zeros_on_vision_parameters(toy_model, text_batch):
    """Not None: DistributedDataParallel waits for every parameter."""
    for name, gradient in gradients(toy_model, text_batch).items():
        assert gradient.any() == ("vision" not in name), name


def test_an_image_batch_without_text_targets_leaves_zeros_on_the_head(toy_model, batch, toy_config):
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] < toy_config.text_vocab_size, -100)
    assert not gradients(toy_model, batch)["lm_head.weight"].any()


def test_frozen_language_model(toy_model, batch):
    """Pretraining: gradients of the vision system are those of full training, the LLM gets none."""
    full = gradients(toy_model, batch)
    for name, parameter in toy_model.named_parameters():
        parameter.requires_grad_("vision" in name)
        parameter.grad = None
    toy_model(**batch).loss.backward()
    for name, parameter in toy_model.named_parameters():
        if "vision" in name:
            assert_same(parameter.grad, full[name], 1e-6)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_activation_checkpointing(toy_model, batch, text_batch, frozen, reentrant):
    for name, parameter in toy_model.named_parameters():
        parameter.requires_grad_("vision" in name or not frozen)

    def trained(inputs):
        toy_model.train().zero_grad()
        toy_model(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in toy_model.named_parameters() if p.grad is not None}

    inputs = [batch] if frozen else [batch, text_batch]  # a text batch reaches a frozen LLM without any gradient
    expected = [trained(one) for one in inputs]
    toy_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert toy_model.is_gradient_checkpointing
    toy_model.enable_input_require_grads()
    for one, gradient in zip(inputs, expected, strict=True):
        actual = trained(one)
        assert actual.keys() == gradient.keys()
        for name in gradient:
            assert_same(actual[name], gradient[name], 1e-6)


def test_autocast(toy_model, batch):
    exact = toy_model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = toy_model.train()(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in toy_model.parameters())


def test_dropout_of_the_attention_is_the_language_models(batch):
    model = make_model(make_config(text={"attention_dropout": 0.5})).train()
    assert model(**batch).loss != model(**batch).loss
    model.eval()
    assert model(**batch).loss == model(**batch).loss


def test_base_model_and_head_give_the_text_loss(toy_model, text_batch):
    """TRL trains on `base_model(...).last_hidden_state` and the weight of the output embeddings."""
    inputs = {name: tensor for name, tensor in text_batch.items() if name != "labels"}
    hidden = toy_model.train().base_model(**inputs, use_cache=False).last_hidden_state
    logits = hidden[:, :-1] @ toy_model.get_output_embeddings().weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), text_batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, toy_model(**text_batch).loss)


def test_base_model_merges_images_itself(toy_model, batch, toy_config):
    """The hidden states are aligned with the labels, and text after images reads the features."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = toy_model.base_model(**inputs).last_hidden_state
    assert hidden.shape == (*batch["input_ids"].shape, toy_config.text_config.hidden_size)
    is_text = batch["input_ids"] < toy_config.text_vocab_size
    assert_same(toy_model.lm_head(hidden)[is_text], toy_model(**inputs).logits[is_text], 1e-5)


def test_input_and_output_embeddings(toy_model):
    assert toy_model.get_input_embeddings() is toy_model.model.language_model.embed_tokens
    assert toy_model.get_output_embeddings() is toy_model.lm_head
    table = torch.nn.Embedding(50, 32)
    toy_model.set_input_embeddings(table)
    assert toy_model.model.language_model.embed_tokens is table


@pytest.fixture
def adapted(toy_model):
    """LoRA on every linear map, with weights of use."""
    model = get_peft_model(
        copy.deepcopy(toy_model), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model.eval()


def test_lora_covers_both_halves(adapted):
    covered = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert {name.rsplit(".", 1)[-1] for name in covered if "language_model" in name} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert {name.rsplit(".", 1)[-1] for name in covered if "vision_model" in name} == {"A", "B", "proj"}


def test_lora_trains(adapted, batch):
    adapted.train()(**batch).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_lora_merges_and_reloads(adapted, toy_model, batch, tmp_path):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = adapted(**inputs)
        assert not torch.allclose(expected.vision_logits, toy_model(**inputs).vision_logits, atol=1e-2)
        adapted.save_pretrained(tmp_path)
        for model in (PeftModel.from_pretrained(copy.deepcopy(toy_model), tmp_path), adapted.merge_and_unload()):
            output = model(**inputs)
            assert_same(output.logits, expected.logits)
            assert_same(output.vision_logits, expected.vision_logits)


def test_lora_generates_images(adapted, toy_config):
    prompt = torch.tensor([[1, 5, toy_config.boi_token_id]])
    new = adapted.generate(input_ids=prompt, do_sample=False, max_new_tokens=6)[0, 3:].tolist()
    assert new[4:] == [toy_config.eoi_token_id, toy_config.newline_token_id]


class CountBackward(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    def __init__(self):
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.multiply_adds += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        return func(*args, **(kwargs or {}))


def backward_multiply_adds(model, **inputs):
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    with CountBackward() as count:
        loss.backward()
    return count.multiply_adds


def test_a_frozen_language_model_is_not_differentiated(toy_config):
    """Its rows pass gradients on to the images they read, and in the first layer not even that: their input is constant."""
    model = make_model(toy_config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision" in name)
    row = [1, *make_image(toy_config), NEWLINE, 5, 6, 7]
    ids = torch.tensor([row])
    text = toy_config.text_config
    hidden, inner, keys, heads = text.hidden_size, text.intermediate_size, 16, text.vocab_size
    language, vision = 5, 6
    per_row = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    first_layer_inputs = hidden * hidden + 2 * hidden * keys  # q, k, v of constant rows
    language_cost = (
        language * (2 * per_row - first_layer_inputs) + 3 * hidden * heads
    )  # three of its rows are supervised
    low_rank = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    low_rank += [(hidden, inner), (hidden, inner), (inner, hidden)]
    expert = 2 * 2 * sum((a + b) * (b // toy_config.expert_down_ratio) for a, b in low_rank)  # two layers, dX and dW
    bridges = 2 * toy_config.bridge_rank * (hidden + keys)
    bridge_cost = 2 * 2 * bridges * (vision + language) - language * 2 * toy_config.bridge_rank * hidden
    hybrid = 2 * vision * hidden * (hidden + toy_config.feature_size)
    codes = 2 * 5 * 2 * 8 * hidden  # five supervised codes and EOI, two heads of 8
    expected = language_cost + vision * expert + bridge_cost + hybrid + codes
    assert backward_multiply_adds(model, input_ids=ids) == expected


def test_text_beside_a_frozen_language_model_is_not_differentiated_at_all(toy_config):
    model = make_model(toy_config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision" in name)
    head = 3 * 32 * 50  # the gradient of three rows, which ends there
    assert backward_multiply_adds(model, input_ids=torch.tensor([[1, 5, 9, 8]])) == head
