"""What is counted for answering is what live objects hold."""

import pytest
import torch

from modeling_libra import LibraConfig
from tests.modeling.toys import NEWLINE, make_config, make_features, make_image, make_model
from training.inference_memory import CONTEXTS, FORMS, cache_bytes, main, prefill_bytes, weight_bytes


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_weights_and_cache(family, form):
    config = make_config(family)
    model = make_model(config).to(getattr(torch, form))
    assert weight_bytes(config, form) == sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.tensor([[1, *make_image(config), NEWLINE, 5, 6]])
    features = make_features(config, 1).to(model.dtype)
    with torch.no_grad():
        output = model(input_ids=ids, image_features=features, use_cache=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    tensors = [value for layer in cache.layers for value in vars(layer).values() if torch.is_tensor(value)]
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel()}
    assert sum(held.values()) == cache_bytes(config, form, ids.shape[1])


def test_the_table_of_the_11b_model(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(CONTEXTS) * len(FORMS)
    config = LibraConfig()
    assert weight_bytes(config, "float32") == 2 * weight_bytes(config, "bfloat16")
    assert 0.5 < weight_bytes(config, "int8") / weight_bytes(config, "bfloat16") < 0.55
    assert 0.25 < weight_bytes(config, "nf4") / weight_bytes(config, "bfloat16") < 0.32
    assert prefill_bytes(config, "int8", 10) > prefill_bytes(config, "bfloat16", 10)
