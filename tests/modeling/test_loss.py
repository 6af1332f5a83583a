"""The unified loss, by hand from the logits and in chunks; what is never supervised; labels that are refused."""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modeling_libra import loss_libra
from modeling_libra.image_blocks_libra import codebook_entries
from modeling_libra.loss_libra import summed_cross_entropy
from tests.modeling.toys import NEWLINE, make_config, make_features, make_image, make_model, make_rows, pad

CONFIG = make_config()
V, BOI, EOI = CONFIG.text_vocab_size, CONFIG.boi_token_id, CONFIG.eoi_token_id
IMAGE = make_image(CONFIG)
SUPERVISED = 11 + 15  # targets of the rows: text, and four codes and EOI of three images


@pytest.fixture(params=["left", "right"])
def batch(request):
    """Three rows, every token supervised as far as labels can say."""
    input_ids, mask = pad(make_rows(CONFIG), request.param)
    return {"input_ids": input_ids, "attention_mask": mask, "image_features": make_features(CONFIG, 3)}


def terms_by_hand(model, inputs, labels):
    """The loss terms of text targets and of vision targets, one token at a time."""
    with torch.no_grad():
        output = model(**inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    places = iter(range(len(output.vision_logits)))
    vision_place = {(b, t): next(places) for b, t in (ids >= V).nonzero().tolist()}
    text, vision = [], []
    for b, row in enumerate(ids.tolist()):
        for t in range(len(row) - 1):
            target = int(labels[b, t + 1])
            if target in (-100, BOI) or row[t] == EOI or not mask[b, t] or not mask[b, t + 1]:
                continue
            if target < V:
                text.append(-output.logits[b, t].log_softmax(-1)[target])
            else:
                entries = codebook_entries(torch.tensor(target), CONFIG)
                log_probs = output.vision_logits[vision_place[b, t]].log_softmax(-1)
                vision.append(-sum(log_probs[k, entry] for k, entry in enumerate(entries)) / len(entries))
    return torch.stack(text), torch.stack(vision)


def codebooks_by_hand(model, inputs):
    """The loss terms of each codebook on every code and EOI: `(targets, codebooks)`."""
    with torch.no_grad():
        logits = model(**inputs).vision_logits.log_softmax(-1)  # (vision rows, codebooks, entries)
    vision = inputs["input_ids"][inputs["input_ids"] >= V]  # BOI, codes, EOI, BOI, ...
    targets = (vision != BOI).nonzero().squeeze(1)  # each is predicted by the row before it
    return -logits[targets - 1].gather(2, codebook_entries(vision[targets], CONFIG)[..., None]).squeeze(2)


def supervise_everything(batch):
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_by_hand(toy_model, batch, mode):
    labels = supervise_everything(batch)
    text, vision = terms_by_hand(toy_model, batch, labels)
    assert (len(text), len(vision)) == (11, 15)
    output = toy_model.train(mode == "train")(**batch, labels=labels)
    torch.testing.assert_close(output.loss, torch.cat([text, vision]).mean())
    torch.testing.assert_close(output.text_loss, text.mean())
    torch.testing.assert_close(output.vision_loss, vision.mean())
    torch.testing.assert_close(output.codebook_losses, codebooks_by_hand(toy_model, batch).mean(0))
    assert (output.logits is None) == (mode == "train")


@pytest.mark.parametrize("seed", range(3))
def test_any_subset_by_hand(toy_model, batch, seed):
    labels = supervise_everything(batch)
    dropped = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    labels = labels.masked_fill(dropped, -100)
    text, vision = terms_by_hand(toy_model, batch, labels)
    torch.testing.assert_close(toy_model(**batch, labels=labels).loss, torch.cat([text, vision]).mean())


@pytest.mark.parametrize(
    "never",
    [
        pytest.param(lambda ids, mask: ids == BOI, id="BOI"),
        pytest.param(lambda ids, mask: ids == NEWLINE, id="newline after an image"),
        pytest.param(lambda ids, mask: mask == 0, id="padding"),
        pytest.param(lambda ids, mask: ids == CONFIG.text_config.bos_token_id, id="BOS"),
    ],
)
def test_never_supervised(toy_model, batch, never):
    """Labels that may not count change nothing."""
    labels = batch["input_ids"].clone()
    blanked = labels.masked_fill(never(batch["input_ids"], batch["attention_mask"]), -100)
    assert not torch.equal(labels, blanked)
    assert torch.equal(toy_model(**batch, labels=labels).loss, toy_model(**batch, labels=blanked).loss)


def test_newlines_of_the_text_are_supervised(toy_model):
    ids = torch.tensor([[1, 5, NEWLINE]])
    expected = -toy_model(input_ids=ids).logits[0, 1].log_softmax(-1)[NEWLINE]
    labels = torch.tensor([[-100, -100, NEWLINE]])
    torch.testing.assert_close(toy_model(input_ids=ids, labels=labels).loss, expected)


def test_one_modality_alone(toy_model, batch):
    labels = supervise_everything(batch)
    text = toy_model(**batch, labels=labels.masked_fill(labels >= V, -100))
    assert torch.equal(text.loss, text.text_loss)
    assert text.vision_loss == 0
    vision = toy_model(**batch, labels=labels.masked_fill(labels < V, -100))
    assert torch.equal(vision.loss, vision.vision_loss)
    assert vision.text_loss == 0


@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_num_items_in_batch(toy_model, batch, count):
    """The Trainer divides by the tokens of all accumulated batches."""
    labels = supervise_everything(batch)
    mean, scaled = toy_model(**batch, labels=labels), toy_model(**batch, labels=labels, num_items_in_batch=count)
    torch.testing.assert_close(scaled.loss, mean.loss * SUPERVISED / 7)
    assert torch.equal(scaled.text_loss, mean.text_loss)


def test_accumulated_batches_are_one_batch(toy_model, batch):
    """Row by row with `num_items_in_batch` gives the gradients of the whole batch."""
    labels, features = supervise_everything(batch), batch["image_features"].split([2, 0, 1])
    toy_model.train()(**batch, labels=labels).loss.backward()
    whole = {name: p.grad.clone() for name, p in toy_model.named_parameters()}
    toy_model.zero_grad()
    for i in range(3):
        row = {"input_ids": batch["input_ids"][[i]], "attention_mask": batch["attention_mask"][[i]]}
        row_features = features[i] if len(features[i]) else None
        toy_model(**row, image_features=row_features, labels=labels[[i]], num_items_in_batch=SUPERVISED).loss.backward()
    for name, parameter in toy_model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4)


def test_loss_of_a_half_precision_model_is_float32(batch):
    model = make_model(CONFIG).to(torch.bfloat16)
    assert model(**batch, labels=supervise_everything(batch)).loss.dtype == torch.float32


def trained(model, chunk, **inputs):
    """Loss and gradients of a training step with `chunk` logits at a time."""
    model.train().zero_grad()
    with patch.object(loss_libra, "CHUNK_LOGITS", chunk):
        output = model(**inputs)
        output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, atol=atol, rtol=1e-4, msg=name)


@settings(max_examples=15)
@given(
    chunk=st.integers(1, 15 * V),
    seed=st.integers(0, 99),
    dropped=st.sampled_from([0.0, 0.5, 0.9]),
    frozen=st.booleans(),
)
def test_chunks_of_any_size_are_one_batch(chunk, seed, dropped, frozen):
    model = make_model(CONFIG, seed=seed)
    model.lm_head.requires_grad_(not frozen)
    input_ids, mask = pad(make_rows(CONFIG))
    labels = input_ids.masked_fill(mask == 0, -100)
    drop = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < dropped
    drop[0, -1] = False  # one target at least
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels.masked_fill(drop, -100)}
    inputs["image_features"] = make_features(CONFIG, 3, seed)
    assert_same_step(trained(model, chunk, **inputs), trained(model, 10**9, **inputs))


def test_chunks_under_autocast(toy_model, batch):
    inputs = batch | {"labels": supervise_everything(batch)}
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(trained(toy_model, 3 * V, **inputs), trained(toy_model, 10**9, **inputs), atol=1e-2)


def test_chunks_of_a_half_precision_model(batch):
    """Sums in float32, gradients in the dtype of the model."""
    model = make_model(CONFIG).to(torch.bfloat16)
    inputs = batch | {"labels": supervise_everything(batch)}
    chunked, whole = trained(model, 3 * V, **inputs), trained(model, 10**9, **inputs)
    assert chunked[0].dtype == torch.float32
    assert {gradient.dtype for gradient in chunked[1].values()} == {torch.bfloat16}
    assert_same_step(chunked, whole, atol=1e-2)


def test_chunks_recompute_the_same_dropout(batch):
    """As adapters on a head may have it: the gradient is that of the masks that were drawn in forward."""
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, V))
    rows, targets = torch.randn(10, 8), torch.arange(10)
    gradients = []
    for again in (loss_libra.checkpoint, lambda function, *args, use_reentrant: function(*args)):
        torch.manual_seed(0)
        head.zero_grad()
        with patch.multiple(loss_libra, CHUNK_LOGITS=3 * V, checkpoint=again):
            summed_cross_entropy(head, rows, targets, V).backward()
        gradients.append(head[1].weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("rows", "training", "calls"),
    [
        pytest.param(10, True, [3, 3, 3, 1, 3, 3, 3], id="all but the last again"),
        pytest.param(3, True, [3], id="one chunk"),
        pytest.param(0, True, [0], id="no rows, but in the graph"),
        pytest.param(10, False, [3, 3, 3, 1], id="evaluation"),
    ],
)
def test_rows_a_head_is_called_with(rows, training, calls):
    head, seen = nn.Linear(8, V), []
    head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with patch.object(loss_libra, "CHUNK_LOGITS", 3 * V + 1), torch.set_grad_enabled(training):
        total = summed_cross_entropy(head, torch.randn(rows, 8), torch.zeros(rows, dtype=torch.long), V)
    if training:
        total.backward()
        assert head.weight.grad.any() == (rows > 0)
    assert seen == calls
    assert (total > 0) == (rows > 0)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_chunks_in_distributed_training(toy_model, batch):
    """Every parameter gets its gradient once a step, on batches of one modality too, else the next step is refused."""
    labels = supervise_everything(batch)
    distributed = DistributedDataParallel(copy.deepcopy(toy_model))
    text_row = {"input_ids": torch.tensor([[1, 6, 7, 8, 9]])}
    steps = [
        batch | {"labels": labels},
        text_row | {"labels": text_row["input_ids"]},
        batch | {"labels": labels.masked_fill(labels < V, -100)},
        batch | {"labels": labels},
    ]
    for inputs in steps:
        expected = trained(toy_model, 10**9, **inputs)
        assert len(expected[1]) == len(list(toy_model.parameters()))
        loss, gradients = trained(distributed, 3 * V, **inputs)
        assert_same_step((loss, {name.removeprefix("module."): g for name, g in gradients.items()}), expected)


ROW = [1, 5, *IMAGE, NEWLINE, 7]


@pytest.mark.parametrize(
    ("place", "label", "message"),
    [
        pytest.param(3, 7, "has 7 at position 3; a token inside an image predicts a code or EOI", id="text in image"),
        pytest.param(1, V + 3, f"has {V + 3} at position 1; .*any other token text", id="code in text"),
        pytest.param(8, V + 3, f"has {V + 3} at position 8; .*any other token text", id="code after EOI"),
        pytest.param(2, EOI, f"has {EOI} at position 2; .*any other token text", id="EOI in text"),
        pytest.param(9, 88, r"has 88 at position 9; labels must be -100 or in \[0, 88\)", id="too large"),
        pytest.param(9, -1, r"has -1 at position 9; labels must be -100 or in \[0, 88\)", id="negative"),
    ],
)
def test_labels_no_head_can_predict(toy_model, place, label, message):
    ids = torch.tensor([[1, 5, 6, *[7] * 7], ROW])
    labels = ids.clone()
    labels[1, place] = label
    with pytest.raises(ValueError, match=f"Row 1 of labels {message}"):
        toy_model(input_ids=ids, labels=labels)


def test_shifted_labels(toy_model):
    ids = torch.tensor([ROW])
    with pytest.raises(ValueError, match="Are labels shifted already"):
        toy_model(input_ids=ids[:, :-1], labels=ids[:, 1:])


@pytest.mark.parametrize("labels", [[-100] * len(ROW), [-100, -100, BOI, *[-100] * 5, NEWLINE, -100]], ids=str)
def test_labels_that_supervise_nothing(toy_model, labels):
    with pytest.raises(ValueError, match="labels supervise no token of the batch"):
        toy_model(input_ids=torch.tensor([ROW]), labels=torch.tensor([labels]))


def test_labels_of_another_shape(toy_model):
    ids = torch.tensor([ROW])
    with pytest.raises(ValueError, match=r"labels has shape \(1, 9\), input_ids \(1, 10\)"):
        toy_model(input_ids=ids, labels=ids[:, 1:])


def test_a_batch_without_targets_among_accumulated_ones(toy_model):
    """It adds nothing to the sum that the other batches divide; alone it is an error."""
    ids, labels = torch.tensor([ROW]), torch.full((1, len(ROW)), -100)
    assert toy_model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss == 0
    with pytest.raises(ValueError, match="labels supervise no token of the batch"):
        toy_model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(0))


def test_labels_of_what_follows_a_cache(toy_model):
    """Answers on a prefix that is shared: the mask covers the cache, too."""
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :3] = -100
    expected = toy_model(input_ids=ids, attention_mask=mask, labels=labels).loss
    cache = toy_model(input_ids=ids[:, :2], use_cache=True).past_key_values
    inputs = {"input_ids": ids[:, 2:], "labels": labels[:, 2:], "attention_mask": mask, "past_key_values": cache}
    torch.testing.assert_close(toy_model(**inputs).loss, expected)


def test_packed_sequences_are_those_apart(toy_model):
    rows = torch.tensor([[1, 5, 6, 7]]), torch.tensor([[1, 8, 9]])
    packed = torch.cat(rows, dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    apart = [toy_model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in rows]
    together = toy_model(input_ids=packed, labels=packed, position_ids=positions).loss
    torch.testing.assert_close(together, sum(apart) / 5)


def test_both_streams_stay_in_float32_under_autocast(batch):
    model, kept = make_model(), []
    model.model.vision_model.layers[-1].register_forward_pre_hook(lambda _, args: kept.extend(args[:2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch)
    assert {stream.dtype for stream in kept if torch.is_tensor(stream)} == {torch.float32}
