"""Row (g) of Table 3: an image tokenizer whose encoder is trained from scratch."""

import pytest
import torch
import yaml
from transformers import CLIPVisionConfig, CLIPVisionModel

from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from tests.training.libra_parts import SMALL_TOKENIZER
from training import train_image_tokenizer
from training.fresh_encoder import FreshEncoderTokenizer, freeze_encoder
from training.train_image_tokenizer import ImageTokenizerArguments

SETTINGS = {
    "tokenizer_config": SMALL_TOKENIZER,
    "perceptual": "none",
    "other_emoji": False,
    "train_samples": 40,
    "eval_samples": 4,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12
    )
    model = CLIPVisionModel(config)
    model.save_pretrained(tmp_path / "clip")
    return model


@pytest.fixture
def train(clip, icons, tmp_path):
    def run(out: str, **settings) -> LibraImageTokenizer:
        config = tmp_path / f"{out}.yaml"
        paths = {"clip": str(tmp_path / "clip"), "icons": str(icons), "output_dir": str(tmp_path / out)}
        config.write_text(yaml.safe_dump(SETTINGS | paths | settings))
        train_image_tokenizer.main(["--config", str(config)])
        loaded, report = LibraImageTokenizer.from_pretrained(tmp_path / out, output_loading_info=True)
        assert not any(report.values()), report
        return loaded

    return run


def encoder_of(model) -> dict[str, torch.Tensor]:
    return model.clip.state_dict()


def test_the_encoder_is_fresh_and_trained(train, clip):
    one, two = (train(f"{steps}", encoder_from_scratch=True, max_steps=steps) for steps in (1, 2))
    given = {name: weight for name, weight in clip.state_dict().items() if weight.ndim == 2}
    for name, weight in given.items():
        assert not torch.allclose(weight, encoder_of(one)[name], atol=1e-2), name  # none of the given weights
        if "position" not in name:
            assert not torch.equal(encoder_of(one)[name], encoder_of(two)[name]), name  # trained from step to step
    assert not any(parameter.requires_grad for parameter in one.clip.parameters())
    assert one.config.architectures == ["LibraImageTokenizer"]


def test_without_the_switch_the_encoder_is_the_given_one(train, clip):
    kept = encoder_of(train("kept", max_steps=2))
    assert all(torch.equal(weight, kept[name]) for name, weight in clip.state_dict().items() if name in kept)
    assert ImageTokenizerArguments("clip").encoder_from_scratch is False


def test_a_stopped_run_goes_on_with_its_encoder(train):
    whole = train("whole", encoder_from_scratch=True, max_steps=2)
    train("parts", encoder_from_scratch=True, max_steps=1)
    resumed = train("parts", encoder_from_scratch=True, max_steps=2)
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name


def test_it_computes_what_the_frozen_one_computes(clip):
    """Gradients apart, it is the same model: before and after it is frozen."""
    torch.manual_seed(1)
    plain = LibraImageTokenizer.from_clip(clip, **SETTINGS["tokenizer_config"]).eval()
    fresh = FreshEncoderTokenizer(plain.config).eval()
    fresh.load_state_dict(plain.state_dict())
    pixels = torch.randn(3, 3, 48, 48)
    expected = plain.encode(pixels)
    for _ in range(2):
        found = fresh.encode(pixels)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.features, expected.features)
        assert not found.features.requires_grad
        torch.testing.assert_close(fresh(pixels).reconstruction, plain(pixels).reconstruction)
        freeze_encoder(fresh)
    assert type(fresh) is LibraImageTokenizer


@pytest.mark.parametrize("settings", [{"perceptual": "encoder"}, {"perceptual": "none", "codes_of": "folder"}])
def test_what_needs_an_encoder_that_stays(settings):
    with pytest.raises(
        ValueError, match="encoder_from_scratch trains the encoder: leave codes_of out, and set percept"
    ):
        ImageTokenizerArguments("clip", encoder_from_scratch=True, **settings)
