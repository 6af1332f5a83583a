"""Where and how a repository is loaded: device maps with offload to CPU and disk, dtypes. Outputs stay the same."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from libra_cli.loading import load_libra

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def expected(repo, golden):
    """Inputs with an image, and logits and greedy ids of the model in memory."""
    model, processor = load_libra(repo)
    image = str(golden / "official_checkpoint" / "image_0.png")
    inputs = dict(processor(images=image, return_tensors="pt"))
    with torch.no_grad():
        logits = model(**inputs).logits
    return inputs, logits, model.generate(**inputs, **GREEDY)


def layers_on_disk(model) -> dict[str, str]:
    """Everything in memory but the second layer of either stream, the vision embedding and the text head."""
    names = ["language_model", "vision_model"]
    device_map = {"lm_head": "disk", "vision_lm_head": "cpu", "model.vision_model.embedding": "disk"}
    for name in names:
        for index in range(len(model.model.vision_model.layers)):
            device_map[f"model.{name}.layers.{index}"] = "disk" if index == 1 else "cpu"
    for name in ("language_model.embed_tokens", "language_model.norm", "language_model.rotary_emb"):
        device_map[f"model.{name}"] = "cpu"
    return device_map | {"model.vision_model.norm": "cpu", "model.vision_model.sequence": "cpu"}


@pytest.mark.parametrize("where", ["cpu", "auto", "disk"])
def test_device_maps_give_the_same(where, repo, expected, tmp_path):
    options = {"device_map": {"": "cpu"} if where == "cpu" else "auto"}
    if where == "disk":
        options = {"device_map": layers_on_disk(load_libra(repo)[0]), "offload_folder": str(tmp_path / "offload")}
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, **options).eval()
    on_disk = [name for name, weight in model.named_parameters() if weight.is_meta]
    assert bool(on_disk) == (where == "disk")
    inputs, logits, ids = expected
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(**inputs, **GREEDY), ids)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto"])
def test_dtypes(dtype, repo, expected):
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype=dtype).eval()
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert {weight.dtype for weight in model.parameters()} == {wanted}
    inputs, logits, _ = expected
    inputs = inputs | {"image_features": inputs["image_features"].to(wanted)}
    with torch.no_grad():
        found = model(**inputs).logits.float()
    kept = logits.isfinite()
    assert (found[kept] - logits[kept]).abs().max() < (1e-4 if wanted == torch.float32 else 0.1 * logits[kept].std())
