"""The image tokenizer's configuration around CLIPs of other sizes than the release's."""

import pytest

from processing.configuration_libra_image_tokenizer import CLIP_VIT_L_14_336, LibraImageTokenizerConfig

VIT_L_14_224 = CLIP_VIT_L_14_336 | {"image_size": 224}
VIT_B_32 = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32}
VIT_B_16 = VIT_B_32 | {"patch_size": 16}


def test_around_the_clip_of_the_release_it_is_the_release():
    made, released = LibraImageTokenizerConfig.for_clip(CLIP_VIT_L_14_336), LibraImageTokenizerConfig()
    assert made.to_dict() == released.to_dict()


@pytest.mark.parametrize(
    ("clip", "layers", "resolutions", "widest"),
    [
        (VIT_L_14_224, (2, 10, 18, 22), [16, 32, 64, 128, 224], (4, 8)),
        (VIT_B_16, (1, 5, 9, 11), [14, 28, 56, 112, 224], (4, 8)),
        (VIT_B_32, (1, 5, 9, 11), [7, 14, 28, 56, 112, 224], (4, 8)),
        (VIT_B_16 | {"patch_size": 1, "image_size": 4}, (1, 5, 9, 11), [4], (8,)),
    ],
)
def test_around_others_it_is_in_proportion(clip, layers, resolutions, widest):
    config = LibraImageTokenizerConfig.for_clip(clip)
    assert config.select_layers == layers
    assert config.decoder_resolutions == resolutions
    assert config.ch_mult[-2:] == widest
    assert config.attn_resolutions == (config.grid,)


def test_fields_win():
    config = LibraImageTokenizerConfig.for_clip(VIT_B_32, select_layers=[3], ch_mult=[1, 2], resolution=128)
    assert (config.select_layers, config.decoder_resolutions, config.feature_size) == ([3], [7, 128], 768)


def test_too_few_layers():
    with pytest.raises(ValueError, match="CLIP of 3 layers has no 4 different ones"):
        LibraImageTokenizerConfig.for_clip(VIT_B_32 | {"num_hidden_layers": 3})


@pytest.mark.parametrize("image_size", [225, [224, 224]])
def test_images_that_are_no_square_of_patches(image_size):
    with pytest.raises(ValueError, match="image_size must be an integer multiple"):
        LibraImageTokenizerConfig.for_clip(VIT_B_32 | {"image_size": image_size})
