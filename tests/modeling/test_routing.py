"""The routed decoder against its definition, written here as loops over tokens and query/key pairs."""

import pytest
import torch
from torch.nn import functional as F

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

# The whole model, and it without the parts that Table 3 of the paper takes away.
SWITCHES = [
    {},
    {"use_bridge": False},
    {"use_expert": False},
    {"use_expert": False, "use_bridge": False},
    {"use_continuous_features": False},
]


class NaiveLibra:
    """One row at a time, one token at a time, one query/key pair at a time, in float64; nothing is shared with the model
    but its weights and its configuration."""

    def __init__(self, model):
        self.config, self.text = model.config, model.config.text_config
        self.weights = {name: weight.double() for name, weight in model.state_dict().items()}
        self.head_dim = getattr(self.text, "head_dim", None) or 32 // self.text.num_attention_heads

    def linear(self, name, x):
        """A dense map of the LLM, or the product of two matrices of the vision system."""
        if f"{name}.weight" in self.weights:
            bias = self.weights.get(f"{name}.bias", 0)
            return self.weights[f"{name}.weight"] @ x + bias
        return self.weights[f"{name}.B.weight"] @ (self.weights[f"{name}.A.weight"] @ x)

    def norm(self, name, x):
        return self.weights[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + self.text.rms_norm_eps).sqrt()

    def rotate(self, x, position):
        """RoPE of one head: the two halves are the coordinates of `head_dim / 2` planes."""
        half = self.head_dim // 2
        theta = self.text.rope_parameters["rope_theta"]
        angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:half], x[half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    def side(self, is_vision):
        """Whose final norm and, with an expert, whose layers a token meets."""
        return "model.vision_model" if is_vision else "model.language_model"

    def layer(self, layer, is_vision):
        """Whose norms, projections and MLP a token meets in a layer."""
        return f"{self.side(is_vision and self.config.use_expert)}.layers.{layer}"

    def embed(self, token, feature):
        """A text embedding, or `W RMSNorm(concat(E1(id1), E2(id2), E_c))`."""
        size, code = self.config.codebook_size, token - self.config.text_vocab_size
        if code < 0:
            return self.weights["model.language_model.embed_tokens.weight"][token]
        entries = {size**2: (size, size), size**2 + 1: (size + 1, size + 1)}.get(code, divmod(code, size))
        name = "model.vision_model.embedding"
        discrete = [self.weights[f"{name}.embed_tokens.{k}.weight"][entry] for k, entry in enumerate(entries)]
        if not self.config.use_continuous_features:
            return torch.cat(discrete)
        return self.linear(f"{name}.proj", self.norm(f"{name}.norm", torch.cat([*discrete, feature])))

    def heads(self, name, x):
        return self.linear(name, x).view(-1, self.head_dim)

    def attention(self, layer, rows, is_vision):
        """The outputs of one layer's attention, and its weights `(heads, queries, keys)`."""
        queries, keys, values, bridge_keys, bridge_values = [], [], [], [], []
        for x, vision in zip(rows, is_vision):
            attention = f"{self.layer(layer, vision)}.self_attn"
            query, key = self.heads(f"{attention}.q_proj", x), self.heads(f"{attention}.k_proj", x)
            if self.text.model_type == "qwen3":
                query, key = self.norm(f"{attention}.q_norm", query), self.norm(f"{attention}.k_norm", key)
            queries.append(query)
            keys.append(key)
            values.append(self.heads(f"{attention}.v_proj", x))
            if self.config.use_bridge:
                bridge = f"model.vision_model.layers.{layer}.self_attn"
                read = "on_vision" if vision else "on_language"
                bridge_keys.append(self.heads(f"{bridge}.k_bridge_{read}", x))
                bridge_values.append(self.heads(f"{bridge}.v_bridge_{read}", x))
        groups = self.text.num_attention_heads // self.text.num_key_value_heads
        weights = torch.zeros(self.text.num_attention_heads, len(rows), len(rows), dtype=torch.float64)
        outputs = []
        for i, vision in enumerate(is_vision):
            heads = []
            for head in range(self.text.num_attention_heads):
                scores, seen = [], []
                for j in range(self.first_visible(layer, i), i + 1):
                    key, value = keys[j][head // groups], values[j][head // groups]
                    if self.config.use_bridge and is_vision[j] != vision:
                        key = key + bridge_keys[j][head // groups]
                        value = value + bridge_values[j][head // groups]
                    scores.append(self.rotate(queries[i][head], i) @ self.rotate(key, j) / self.head_dim**0.5)
                    seen.append(value)
                row = torch.stack(scores).softmax(0)
                weights[head, i, i + 1 - len(seen) : i + 1] = row
                heads.append(row @ torch.stack(seen))
            outputs.append(self.linear(f"{self.layer(layer, vision)}.self_attn.o_proj", torch.cat(heads)))
        return outputs, weights

    def first_visible(self, layer, query):
        """The first key a query sees: the start, or of a sliding window's width back."""
        window = getattr(self.text, "sliding_window", None)
        layer_types = getattr(self.text, "layer_types", None) or ["sliding_attention"] * self.text.num_hidden_layers
        if window is None or layer_types[layer] == "full_attention":
            return 0
        return max(0, query + 1 - window)

    def mlp(self, name, x):
        return self.linear(
            f"{name}.down_proj", F.silu(self.linear(f"{name}.gate_proj", x)) * self.linear(f"{name}.up_proj", x)
        )

    def __call__(self, ids, features):
        """Normed hidden rows `(length, hidden)` and the attention weights of all layers; features as rows in order."""
        V, BOI = self.config.text_vocab_size, self.config.boi_token_id
        is_vision = [token >= V for token in ids]
        remaining = iter(features.double().flatten(0, 1))
        blank = torch.zeros(self.config.feature_size, dtype=torch.float64)
        rows = [self.embed(token, next(remaining) if V <= token < BOI else blank) for token in ids]
        weights = []
        for layer in range(self.text.num_hidden_layers):
            names = [self.layer(layer, vision) for vision in is_vision]
            normed = [self.norm(f"{name}.input_layernorm", row) for name, row in zip(names, rows)]
            outputs, layer_weights = self.attention(layer, normed, is_vision)
            weights.append(layer_weights)
            rows = [row + output for row, output in zip(rows, outputs)]
            normed = [self.norm(f"{name}.post_attention_layernorm", row) for name, row in zip(names, rows)]
            rows = [row + self.mlp(f"{name}.mlp", x) for name, row, x in zip(names, rows, normed)]
        hidden = [self.norm(f"{self.side(vision)}.norm", row) for vision, row in zip(is_vision, rows)]
        return torch.stack(hidden), weights


@pytest.mark.parametrize("switches", SWITCHES, ids=["whole", *(" and ".join(off) for off in SWITCHES[1:])])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_definition(family, attention, switches):
    config = make_config(family, **switches)
    model = make_model(config, attention)
    ids = make_rows(config)[0]
    features = make_features(config, 2)
    expected, expected_weights = NaiveLibra(model)(ids, features)
    with torch.no_grad():
        output = model.model(
            input_ids=torch.tensor([ids]), image_features=features, output_attentions=attention == "eager"
        )
    assert_same(output.last_hidden_state[0], expected, 2e-5)
    if attention == "eager":
        for actual, weights in zip(output.attentions, expected_weights, strict=True):
            assert_same(actual[0], weights, 1e-5)


def test_heads(toy_model):
    """Language rows have the LLM's head, vision rows one per codebook."""
    ids = torch.tensor([make_rows(toy_model.config)[0]])
    features = make_features(toy_model.config, 2)
    with torch.no_grad():
        output = toy_model(input_ids=ids, image_features=features)
        hidden = toy_model.model(input_ids=ids, image_features=features).last_hidden_state
    is_vision = ids >= toy_model.config.text_vocab_size
    assert_same(output.logits[~is_vision], hidden[~is_vision] @ toy_model.lm_head.weight.T, 1e-5)
    assert (output.logits[is_vision] == float("-inf")).all()
    assert output.vision_logits.shape == (12, 2, 8)
    for k, head in enumerate(toy_model.vision_lm_head):
        assert_same(output.vision_logits[:, k], hidden[is_vision] @ head.weight.T, 1e-5)


@pytest.fixture
def three_rows(toy_config):
    input_ids, mask = pad(make_rows(toy_config))
    return {"input_ids": input_ids, "attention_mask": mask}


def hidden(model, inputs, features):
    with torch.no_grad():
        return model.model(**inputs, image_features=features).last_hidden_state


def test_features_change_their_image_and_what_follows(toy_model, toy_config, three_rows):
    features = make_features(toy_config, 3)
    changed = features.clone()
    changed[1, 2] += 1  # the third patch of the second image, in row 0
    difference = (hidden(toy_model, three_rows, features) != hidden(toy_model, three_rows, changed)).any(dim=-1)
    row = three_rows["input_ids"][0].tolist()
    place = len(row) - 1 - row[::-1].index(toy_config.boi_token_id) + 3
    assert not difference[1:].any()
    assert not difference[0, :place].any()
    assert difference[0, place:].all()


def test_features_are_read_in_order(toy_model, toy_config, three_rows):
    features = make_features(toy_config, 3)
    swapped = hidden(toy_model, three_rows, features[[1, 0, 2]])
    assert not torch.equal(swapped, hidden(toy_model, three_rows, features))


def test_no_features_are_zeros(toy_model, toy_config, three_rows):
    zeros = torch.zeros_like(make_features(toy_config, 3))
    assert torch.equal(hidden(toy_model, three_rows, None), hidden(toy_model, three_rows, zeros))


def test_markers_of_an_image_have_no_features(toy_model, toy_config):
    """BOI is the same whatever image follows."""
    inputs = {"input_ids": torch.tensor([[1, *make_image(toy_config)]])}
    first, second = (hidden(toy_model, inputs, make_features(toy_config, 1, seed)) for seed in (0, 1))
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.equal(first[:, 2:], second[:, 2:])


@pytest.mark.parametrize("prefix", ["model.vision_model", "vision_lm_head"])
def test_text_before_an_image_never_meets_vision_parameters(toy_model, toy_config, prefix):
    row = [1, 5, 6, 7, *make_image(toy_config), NEWLINE, 8]
    ids = torch.tensor([row])
    with torch.no_grad():
        before = toy_model(input_ids=ids)
        for name, parameter in toy_model.named_parameters():
            if name.startswith(prefix):
                parameter.add_(0.3)
        after = toy_model(input_ids=ids)
    assert torch.equal(before.logits[:, :4], after.logits[:, :4])
    assert not torch.equal(before.vision_logits, after.vision_logits)
    assert torch.equal(before.logits, after.logits) == (prefix == "vision_lm_head")


def test_vision_rows_never_meet_the_parameters_of_language_rows(toy_model, toy_config):
    """A row that is all image does not depend on the LLM."""
    ids = torch.tensor([make_image(toy_config)])
    with torch.no_grad():
        before = toy_model(input_ids=ids).vision_logits
        for parameter in toy_model.model.language_model.parameters():
            parameter.add_(0.3)
        after = toy_model(input_ids=ids).vision_logits
    assert torch.equal(before, after)
