"""What is counted is what live objects hold."""

import pytest
import torch

from modeling_libra import LibraConfig, LibraForCausalLM
from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from tests.conftest import REPOSITORY
from tests.modeling.toys import NEWLINE, make_config, make_features, make_image, make_model
from tests.training.run_stages import local_bytes
from training.adapters import AdapterArguments
from training.memory import (
    ENGINES,
    GB,
    RECIPES,
    Held,
    activation_bytes,
    count_weights,
    held_by_device,
    image_tokenizer_bytes,
    main,
)
from training.pretrain import freeze_language_model


def after_a_step(model) -> Held:
    """What parameters hold of memory when gradients and moments are there."""
    config = model.config
    ids = torch.tensor([[1, *make_image(config), NEWLINE, 5, 6]])
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    model(input_ids=ids, labels=ids, image_features=make_features(config, 1), use_cache=False).loss.backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    moments = [m for values in optimizer.state.values() for name, m in values.items() if name != "step"]
    return Held(*map(local_bytes, (model.parameters(), gradients, moments)), 0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("recipe", ["pretrain", "sft"])
def test_one_device(recipe, family):
    model = make_model(make_config(family)).train()
    if recipe == "pretrain":
        freeze_language_model(model)
        for name, parameter in model.named_parameters():
            if "vision" not in name:
                parameter.data = parameter.data.bfloat16()
    else:
        # Nothing the loss of one batch does not reach: all have gradients in the count.
        model.lm_head.weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        live = after_a_step(model)
    counted = held_by_device(count_weights(model.config, recipe), "one GPU", 1)
    assert counted[:3] == live[:3]


@pytest.mark.parametrize("target", ["language", "vision", "both"])
def test_lora(target):
    from peft import get_peft_model

    adapter = AdapterArguments(lora_target=target, lora_rank=4)
    model = make_model()
    weights = count_weights(model.config, "lora", adapter)
    tuned = get_peft_model(model, adapter.peft_config())
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    assert sum(weight.numbers for weight in weights if weight.trained) == trained
    assert sum(weight.numbers for weight in weights) == sum(parameter.numel() for parameter in tuned.parameters())


def test_four_bits():
    """The weights that bitsandbytes packs are those of the recipe; `lora` has the same ones in 16 bits."""
    config = LibraConfig()
    half, quarter = (
        {w.name: w for w in count_weights(config, recipe) if not w.trained} for recipe in ("lora", "qlora")
    )
    packed = {name for name, weight in quarter.items() if weight.stored < 1}
    kept = {name for name in quarter if name not in packed}
    assert "lm_head.weight" in kept
    assert all(any(x in n for x in ("norm", "embed", "head", "bridge", "vision_model.embedding")) for n in kept)
    assert not any("bridge" in name for name in packed)
    assert sum(w.numbers for w in half.values()) == sum(w.numbers for w in quarter.values())
    assert sum(quarter[n].numbers for n in packed) == pytest.approx(10.8e9, rel=0.01)


def saved_bytes(config, text, images, checkpointing, language_trained) -> float:
    """What a layer keeps for backward in float32: three layers less one, by half."""
    found = []
    for layers in (1, 3):
        sizes = config.text_config.to_dict() | {"num_hidden_layers": layers}
        model = LibraForCausalLM(LibraConfig(**config.to_dict() | {"text_config": sizes})).train()
        if not language_trained:
            freeze_language_model(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        pictures = [token for i in range(images) for token in (*make_image(config, i), NEWLINE)]
        ids = torch.tensor([[1, *pictures, *[5] * (text - images - 1)]])
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept = {}

        def keep(tensor, own=own, kept=kept):
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=ids, labels=ids, image_features=make_features(config, images), use_cache=False)
        found.append(sum(size for size, _ in kept.values()))
    return (found[1] - found[0]) / 2


@pytest.mark.parametrize("language_trained", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_of_a_layer(checkpointing, language_trained):
    """The estimate is of 2 bytes a number; float32 has 4. It is rounded up, by less than a quarter."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    config = make_config(text=text, image_grid=4, feature_size=16, bridge_rank=8)
    rows, images = 64, 4

    def estimate(layers):
        config.text_config.num_hidden_layers = layers
        return activation_bytes(config, rows, images * 18, 0, checkpointing, language_trained)

    estimated = 2 * (estimate(3) - estimate(1)) / 2
    found = saved_bytes(config, rows, images, checkpointing, language_trained)
    assert found <= estimated <= (1.0 if checkpointing else 1.25) * found


def test_shares_of_devices():
    """All devices together hold what one does, but for rows that do not divide; one device less has more."""
    weights = count_weights(make_config(), "sft")
    one = held_by_device(weights, "one GPU", 1)
    shares = [held_by_device(weights, "FSDP2", devices) for devices in (2, 4, 8)]
    for devices, share in zip((2, 4, 8), shares):
        assert one.weights <= devices * share.weights <= 1.4 * one.weights
        assert share.gradients * 2 == share.moments
    assert shares[0].weights > shares[1].weights > shares[2].weights
    assert held_by_device(weights, "FSDP2", 1) is None
    assert held_by_device(count_weights(make_config(), "qlora"), "FSDP2", 8) is None


def test_the_table(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    written = (REPOSITORY / "training" / "ENGINES.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("|") and line not in written] == []
    assert lines[0].startswith("11,015,856,128 parameters")  # the release's 11B
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert {(row[0], row[1]) for row in rows if row[0] in RECIPES and row[1] in ENGINES} >= {
        *((recipe, engine) for recipe in RECIPES[:3] for engine in ENGINES), ("qlora", "one GPU"), ("qlora", "DDP")
    }  # fmt: skip
    sft = next(row for row in rows if row[:3] == ["sft", "one GPU", "1"])
    assert float(sft[3]) == pytest.approx(11_015_856_128 * 4 / GB, abs=0.1)
    total = sum(map(float, sft[3:7])) + image_tokenizer_bytes(LibraImageTokenizerConfig()) / GB
    assert float(sft[7]) == pytest.approx(total, abs=0.3)
