"""How a fresh vision system starts on a language model: no layer explodes, vanishes, or learns alone.

What was measured when the initialization was chosen. Size (root mean square) of the rows before each layer, at step 0:

| language model | vision rows | text rows |
|---|---|---|
| libra-tiny's (trained; hidden 192, 6 layers) | 0.62 0.62 0.62 0.63 0.63 0.64 | 0.07 6.9 7.8 8.3 9.2 10.1 |
| random, std 0.02 (hidden 256, 6 layers) | 0.65 0.66 0.66 0.66 0.66 0.67 | 0.02 0.07 0.10 0.12 0.15 0.17 |
| random, std 0.08 (hidden 256, 6 layers) | 0.65 0.66 0.66 0.67 0.67 0.68 | 0.08 2.3 3.3 4.0 4.6 5.1 |
| random, std 0.02 (hidden 4096, inner 11008, 4 layers) | 1.8 2.9 3.7 4.4 | 0.02 2.2 3.2 3.9 |

Pretraining on libra-tiny's LLM (frozen; batches of 8 scenes, AdamW without warmup, 200 steps): mean losses of the last 20
steps, and by how much the mean of 20 steps ever rose above its lowest value so far. Several numbers: several seeds.

| start | learning rate | text | vision | rise |
|---|---|---|---|---|
| as it is | 1e-4 | 1.54 | 5.04 | 0.02 |
| as it is | 1e-3 | 0.80 0.83 0.82 | 3.51 3.54 3.55 | 0.02 0.04 0.03 |
| both factors N(0, 0.02) | 1e-3 | 0.83 0.82 0.88 | 3.68 3.68 3.68 | 0.04 0.04 0.05 |
| products as wide as that LLM's matrices, 0.045 | 1e-3 | 0.84 | 3.52 | 0.04 |
| outputs of attention and MLP divided by sqrt(2 layers) | 1e-3 | 0.76 0.82 | 3.52 3.58 | 0.03 0.03 |
| embeddings of codes N(0, 1) | 1e-3 | 0.79 | 3.55 | 0.03 |
| the last two together | 1e-3 | 0.77 | 3.55 | 0.03 |

Plain N(0, 0.02) factors, whose products are seven times narrower, learn the codes more slowly; the other rows are no
further from the first
than its seeds from each other. So nothing is added to what a dense layer of a Llama starts from.
"""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_libra import LibraConfig, LibraForCausalLM
from modeling_libra.routing_libra import LowRankLinear
from modeling_libra.vision_system_libra import fresh_vision_system

TEXT = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LAYERS = range(6)


@pytest.fixture(params=[1, 4], ids=["as initialized", "as spread as a trained one"])
def fresh(request, tmp_path) -> LibraForCausalLM:
    """A fresh vision system on a language model whose matrices have 1 or 4 times the spread they are initialized with."""
    torch.manual_seed(0)
    config = LibraConfig(text_config=TEXT, image_grid=6, feature_size=512)
    llm = AutoModelForCausalLM.from_config(config.text_config)
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.ndim == 2:
                parameter *= request.param
    llm.save_pretrained(tmp_path)
    return fresh_vision_system(tmp_path, config)


@pytest.fixture
def batch(fresh) -> dict[str, torch.Tensor]:
    """Two images with captions. CLIP's features are wide: a few channels are an order above the others."""
    config, generator = fresh.config, torch.Generator().manual_seed(1)
    rows = []
    for _ in range(2):
        codes = torch.randint(config.num_image_codes, (36,), generator=generator) + config.text_vocab_size
        words = torch.randint(20, 512, (20,), generator=generator)
        rows.append([1, config.boi_token_id, *codes.tolist(), config.eoi_token_id, 13, *words.tolist()])
    input_ids = torch.tensor(rows)
    features = torch.randn(2, 36, 512, generator=generator) * torch.cat([torch.full((8,), 20.0), torch.ones(504)])
    return {"input_ids": input_ids, "image_features": features, "labels": input_ids.clone()}


@pytest.mark.parametrize(("width", "out"), [(256, 256), (256, 688), (688, 256), (256, 64)])
def test_an_expert_map_starts_as_wide_as_the_dense_map(fresh, width, out):
    torch.manual_seed(0)
    low_rank = LowRankLinear(width, out, out // 4)
    low_rank.apply(fresh._init_weights)
    product = low_rank.B.weight @ low_rank.A.weight  # (out, width)
    assert product.std().item() == pytest.approx(TEXT.get("initializer_range", 0.02), rel=0.1)
    inner = low_rank.A(torch.randn(100, width))  # (100, rank)
    assert inner.std().item() == pytest.approx(1, rel=0.1)


def test_vision_rows_keep_their_size_through_the_layers(fresh, batch):
    inputs = {name: batch[name] for name in ("input_ids", "image_features")}
    with torch.no_grad():
        states = fresh.model(**inputs, output_hidden_states=True).hidden_states[:-1]  # the last is normed
    is_vision = batch["input_ids"] >= fresh.config.text_vocab_size
    sizes = [state[is_vision].square().mean().sqrt().item() for state in states]
    assert len(sizes) == len(LAYERS)
    assert all(0.5 < size < 2 for size in sizes), sizes
    assert max(sizes) < 1.5 * min(sizes), sizes


def test_every_layer_gets_a_gradient_of_its_own_size(fresh, batch):
    fresh.train()(**batch).loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in fresh.named_parameters() if "vision" in name}
    assert math.hypot(*gradients.values()) < 10
    for part in (
        "self_attn.q_proj.B",
        "self_attn.v_proj.A",
        "self_attn.o_proj.B",
        "mlp.gate_proj.B",
        "mlp.down_proj.A",
    ):
        norms = [gradients[f"model.vision_model.layers.{i}.{part}.weight"] for i in LAYERS]
        assert min(norms) > 0
        # The first layer's reach text rows that are still small beside what they read.
        assert max(norms[1:]) < 4 * min(norms[1:]), (part, norms)
        assert norms[0] < 100 * norms[1], (part, norms)


def test_the_first_loss_is_that_of_guessing(fresh, batch):
    with torch.no_grad():
        loss = fresh.train()(**batch).vision_loss.item()
    assert loss == pytest.approx(math.log(fresh.config.codebook_size + 2), abs=0.2)


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3])
def test_training_starts_without_spikes(fresh, batch, learning_rate):
    """Without warmup, on one batch."""
    parameters = []
    for name, parameter in fresh.train().named_parameters():
        parameter.requires_grad_("vision" in name)
        parameters += [parameter] if "vision" in name else []
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    for _ in range(8):
        loss = fresh(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
