"""What a training step keeps alive: one chunk of logits, and nothing of a frozen language model."""

from functools import cache
from unittest.mock import patch

import pytest
import torch

from modeling_libra import loss_libra
from modeling_libra.loss_libra import summed_cross_entropy
from tests.modeling.memory import MemoryMeter
from tests.modeling.toys import NEWLINE, make_config, make_features, make_image, make_model, make_rows, pad
from training.pretrain import freeze_language_model

V, LENGTH = 1000, 200
CHUNK, ALL = 2**14, 2**40  # logits alive at a time: 16 rows of V, and every row there is
HIDDEN = 32
FLOAT = 4  # bytes


@cache
def training_step(vocab_size: int, length: int, chunk: int, frozen: bool) -> MemoryMeter:
    """Forward and backward of one row: an image and a text, all supervised."""
    text = {"vocab_size": vocab_size, "num_hidden_layers": 1, "max_position_embeddings": 2 * LENGTH}
    config = make_config(text=text)
    model = make_model(config).train()
    if frozen:
        freeze_language_model(model)
    image = [1, *make_image(config), NEWLINE]
    input_ids = torch.tensor([[*image, *range(2, length - len(image) + 2)]])  # (1, length)
    with patch.object(loss_libra, "CHUNK_LOGITS", chunk), MemoryMeter() as meter:
        model(input_ids=input_ids, image_features=make_features(config, 1), labels=input_ids).loss.backward()
    return meter


def mixed_difference(chunk: int, frozen: bool) -> float:
    """How the peak grows with V x length, beyond what it grows with each: 1 is one tensor of this shape in float32."""
    peak = {(v, n): training_step(v, n, chunk, frozen).peak for v in (V, 2 * V) for n in (LENGTH, 2 * LENGTH)}
    grown = peak[2 * V, 2 * LENGTH] - peak[2 * V, LENGTH] - peak[V, 2 * LENGTH] + peak[V, LENGTH]
    return grown / (V * LENGTH * FLOAT)


def test_the_meter_sees_what_only_backward_holds():
    x = torch.ones(1000, requires_grad=True)
    with MemoryMeter() as meter:
        total = x.exp().log().sum()  # exp is kept for the backward of log; log itself is not
        assert (meter.live, meter.peak) == (1000 * FLOAT + FLOAT, 2000 * FLOAT + FLOAT)
        total.backward()
        del total
        assert meter.live == 1000 * FLOAT  # the gradient
        x.grad.mul_(2).view(10, 100)
        assert meter.live == 1000 * FLOAT
    assert {(1000,), (10, 100), ()} <= meter.shapes


@pytest.mark.parametrize("frozen", [False, True])
def test_the_peak_does_not_grow_with_vocabulary_times_length(frozen):
    assert abs(mixed_difference(CHUNK, frozen)) < 0.02


@pytest.mark.parametrize("frozen", [False, True])
def test_it_would_grow_without_chunks(frozen):
    """Logits, their softmax and its gradient: the test above does see them."""
    assert mixed_difference(ALL, frozen) > 2.5


def test_a_larger_vocabulary_costs_its_weights_gradients():
    """Of the embedding and of the head, where it is formed from one chunk while that of the others waits."""
    grown = training_step(2 * V, LENGTH, CHUNK, frozen=False).peak - training_step(V, LENGTH, CHUNK, frozen=False).peak
    assert grown < 3.1 * V * HIDDEN * FLOAT


def test_a_larger_vocabulary_costs_nothing_where_it_is_frozen():
    grown = training_step(2 * V, LENGTH, CHUNK, frozen=True).peak - training_step(V, LENGTH, CHUNK, frozen=True).peak
    assert grown < 0.05 * V * HIDDEN * FLOAT


@pytest.mark.parametrize(("chunk", "most"), [(CHUNK, CHUNK // V), (ALL, LENGTH - 8)], ids=["chunks", "at once"])
def test_rows_of_logits_there_are_at_a_time(chunk, most):
    shapes = training_step(V, LENGTH, chunk, frozen=True).shapes - {(HIDDEN, V)}  # the head's weight, transposed
    assert max(shape[:-1].numel() for shape in shapes if shape and shape[-1] == V) == most


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["lm_head", "predict_codes"])
def test_each_head_keeps_one_chunk(name, grad):
    """Twice the rows take the room of twice the rows, not of their logits."""
    model = make_model(make_config(text={"vocab_size": 500, "hidden_size": 8}, codebook_size=250))
    head, shape = getattr(model, name), () if name == "lm_head" else (2,)
    classes = 500 if name == "lm_head" else 2 * 252

    def peak(rows, chunk):
        states = torch.randn(rows, 8, requires_grad=True)
        targets = torch.zeros(rows, *shape, dtype=torch.long)
        model.zero_grad()
        with (
            patch.object(loss_libra, "CHUNK_LOGITS", chunk),
            torch.set_grad_enabled(grad),
            MemoryMeter() as meter,
        ):
            loss = summed_cross_entropy(head, states, targets, classes)
            if grad:
                loss.sum().backward()
        return meter.peak

    room = 200 * classes * FLOAT
    assert peak(400, ALL) - peak(200, ALL) > 0.99 * room
    assert peak(400, 20 * classes) - peak(200, 20 * classes) < 0.1 * room


def test_a_frozen_language_model_has_no_gradients_and_no_optimizer_state(toy_model, toy_config):
    freeze_language_model(toy_model.train())
    before = {name: value.clone() for name, value in toy_model.state_dict().items()}
    names = {parameter: name for name, parameter in toy_model.named_parameters()}
    input_ids, mask = pad(make_rows(toy_config), "right")
    optimizer = torch.optim.AdamW((p for p in toy_model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        toy_model(
            input_ids=input_ids,
            attention_mask=mask,
            image_features=make_features(toy_config, 3),
            labels=input_ids.masked_fill(mask == 0, -100),
        ).loss.backward()
        assert {name for p, name in names.items() if p.grad is not None} == {n for n in before if "vision" in n}
        optimizer.step()
    assert {names[parameter] for parameter in optimizer.state} == {name for name in before if "vision" in name}
    for name, value in toy_model.state_dict().items():
        assert torch.equal(value, before[name]) == ("vision" not in name), name
