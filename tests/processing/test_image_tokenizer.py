import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import CLIPVisionConfig, CLIPVisionModel

from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from processing.decoder_libra_image_tokenizer import LibraImageDecoder
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from tests.processing.conftest import TINY_CLIP, TINY_TOKENIZER, make_image_tokenizer


def make_config(**overrides) -> LibraImageTokenizerConfig:
    return LibraImageTokenizerConfig(**{"vision_config": TINY_CLIP, **TINY_TOKENIZER, **overrides})


def test_defaults_are_the_release():
    config = LibraImageTokenizerConfig()
    assert (config.grid, config.num_patches, config.feature_size) == (24, 576, 4096)
    assert config.decoder_resolutions == [24, 48, 96, 192, 336]
    assert config.vision_config.num_hidden_layers == 24


def test_the_released_size_runs_as_far_as_shapes_go():
    with torch.device("meta"):
        tokenizer = LibraImageTokenizer(LibraImageTokenizerConfig())
        quantized = tokenizer.quantizer.project_out(torch.zeros(1, 576, 18))
        assert tokenizer._decode_quantized(quantized).shape == (1, 3, 336, 336)
    assert len(tokenizer.clip.encoder.layers) == 22
    assert tokenizer.pre_quant.weight.shape == (1024, 4096)


def test_config_round_trip(tmp_path):
    config = make_config()
    config.save_pretrained(tmp_path)
    assert LibraImageTokenizerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"codebook_size": 500}, "codebook_size must be a power of two"),
        ({"num_codebooks": 0}, "num_codebooks must be at least 1"),
        ({"select_layers": [5]}, r"between 0 \(embeddings\) and vision_config.num_hidden_layers=4, got \[5\]"),
        ({"select_layers": []}, "at least one hidden state"),
        ({"select_layers": [-2]}, r"got \[-2\]"),
        ({"vision_config": {**TINY_CLIP, "patch_size": 7}}, "multiple of vision_config.patch_size"),
        ({"ch": 20}, "multiple of 32"),
        ({"num_attn_heads": 5}, "num_attn_heads must divide"),
        ({"ch_mult": [1]}, "does not upsample"),
    ],
)
def test_config_refuses_sizes_that_do_not_fit(overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        make_config(**overrides)


def test_encode_and_decode_shapes(image_tokenizer, pixel_values):
    codes, features = image_tokenizer.encode(pixel_values)
    assert codes.shape == (3, 16, 2)
    assert codes.dtype == torch.int64
    assert features.shape == (3, 16, 64)
    pixels = image_tokenizer.decode(codes)
    assert pixels.shape == (3, 3, 32, 32)
    assert not pixels.requires_grad


def test_features_are_hidden_states_of_the_whole_clip(pixel_values):
    clip = CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)).eval()
    tokenizer = LibraImageTokenizer.from_clip(clip, **TINY_TOKENIZER)
    states = clip(pixel_values, output_hidden_states=True).hidden_states
    expected = torch.cat([states[1][:, 1:], states[3][:, 1:]], dim=-1)
    torch.testing.assert_close(tokenizer.features(pixel_values), expected)
    assert len(tokenizer.clip.encoder.layers) == 3  # no deeper than the deepest selected layer


def test_an_image_has_the_same_codes_alone_and_in_a_batch(image_tokenizer, pixel_values):
    codes, features = image_tokenizer.encode(pixel_values)
    alone = image_tokenizer.encode(pixel_values[1:2])
    assert torch.equal(alone.codes[0], codes[1])
    torch.testing.assert_close(alone.features[0], features[1])


def test_training_updates_everything_but_clip(pixel_values):
    tokenizer = make_image_tokenizer().train()
    assert not tokenizer.clip.training
    output = tokenizer(pixel_values)
    (output.loss + output.reconstruction.square().mean()).backward()
    for name, parameter in tokenizer.named_parameters():
        is_clip = name.startswith("clip.")
        assert parameter.requires_grad is not is_clip, name
        assert (parameter.grad is None) is is_clip, name


def test_loss_is_the_weighted_sum_of_its_terms(pixel_values):
    tokenizer = make_image_tokenizer(entropy_loss_weight=0.5, diversity_gamma=3.0, commitment_loss_weight=2.0)
    output = tokenizer(pixel_values, return_losses=True)
    expected = 0.5 * (output.per_sample_entropy - 3.0 * output.codebook_entropy) + 2.0 * output.commitment
    torch.testing.assert_close(output.loss, expected)
    evaluated = tokenizer(pixel_values)
    assert evaluated.loss is None
    assert torch.equal(evaluated.codes, tokenizer.encode(pixel_values).codes)
    torch.testing.assert_close(evaluated.reconstruction, tokenizer.decode(evaluated.codes))


def test_save_and_load(image_tokenizer, pixel_values, tmp_path):
    image_tokenizer.save_pretrained(tmp_path)
    loaded = LibraImageTokenizer.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.clip.parameters())
    assert all(p.requires_grad for name, p in loaded.named_parameters() if not name.startswith("clip."))
    codes, features = loaded.encode(pixel_values)
    assert torch.equal(codes, image_tokenizer.encode(pixel_values).codes)
    assert torch.equal(features, image_tokenizer.encode(pixel_values).features)
    assert torch.equal(loaded.decode(codes), image_tokenizer.decode(codes))


def test_bfloat16(image_tokenizer, pixel_values, tmp_path):
    image_tokenizer.save_pretrained(tmp_path)
    tokenizer = LibraImageTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    output = tokenizer(pixel_values)
    assert output.loss.dtype == torch.float32
    assert output.reconstruction.dtype == torch.bfloat16
    codes, features = tokenizer.encode(pixel_values)
    assert features.dtype == torch.bfloat16
    assert (codes == image_tokenizer.encode(pixel_values).codes).float().mean() > 0.8
    assert tokenizer.decode(codes).dtype == torch.bfloat16


def test_a_fresh_decoder_is_not_degenerate():
    torch.manual_seed(0)
    tokenizer = LibraImageTokenizer(make_config())
    pixels = tokenizer.decode(torch.randint(16, (4, 16, 2)))
    assert pixels.std() > 0.05


def test_loading_a_part_keeps_it_and_initializes_the_rest(image_tokenizer, tmp_path):
    state = {key: value for key, value in image_tokenizer.state_dict().items() if not key.startswith("decoder.")}
    image_tokenizer.save_pretrained(tmp_path, state_dict=state)
    loaded = LibraImageTokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.pre_quant.weight, image_tokenizer.pre_quant.weight)
    assert loaded.decoder.conv_in.weight.std() > 0


def test_last_upsampling_goes_to_the_resolution_whatever_its_factor():
    config = make_config(resolution=28, ch_mult=[1, 1, 2])
    assert config.decoder_resolutions == [4, 8, 28]
    assert LibraImageDecoder(config)(torch.randn(1, 16, 4, 4)).shape == (1, 3, 28, 28)
    grid = torch.arange(192.0 * 192).view(1, 1, 192, 192)
    by_factor = F.interpolate(grid, scale_factor=1.75, mode="nearest")
    assert torch.equal(F.interpolate(grid, size=(336, 336), mode="nearest"), by_factor)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 32, 31), (1, 1, 32, 32)])
def test_pixels_of_another_shape_are_refused(image_tokenizer, shape):
    with pytest.raises(ValueError, match=r"must have shape \(n, 3, 32, 32\)"):
        image_tokenizer.encode(torch.zeros(shape))


def test_pixels_that_are_no_numbers_are_refused(image_tokenizer, pixel_values):
    pixel_values[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"images \[1\] contain NaN"):
        image_tokenizer.encode(pixel_values)
    with pytest.raises(ValueError, match="normalized floating point"):
        image_tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_codes_of_another_shape_are_refused(image_tokenizer):
    with pytest.raises(ValueError, match=r"must have shape \(n, 16, 2\), got \(1, 4, 4, 2\)"):
        image_tokenizer.decode(torch.zeros(1, 4, 4, 2, dtype=torch.long))


def test_missing_clip_weights_are_named(image_tokenizer):
    state = image_tokenizer.clip.state_dict()
    del state["pre_layrnorm.bias"]
    with pytest.raises(ValueError, match=r"lack 1 of .* keys: pre_layrnorm\.bias"):
        image_tokenizer.load_clip(state)
