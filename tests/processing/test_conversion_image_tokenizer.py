import shutil

import pytest
import torch
import yaml

from processing.conversion_libra_image_tokenizer import convert_config, load_released
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer


def test_pixel_values(release):
    pixels = release.image_processor(release.images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, release.tensors["pixel_values"], atol=1e-4, rtol=0)


def test_features_codes_and_reconstruction(release):
    codes, features = release.image_tokenizer.encode(release.tensors["pixel_values"])
    torch.testing.assert_close(features, release.tensors["clip_features"], atol=1e-4, rtol=0)
    assert torch.equal(codes.unflatten(1, (release.grid, release.grid)), release.tensors["codes"])
    quantized = release.image_tokenizer.quantizer.codes_to_quantized(codes)  # (n, patches, dim)
    quantized = quantized.transpose(1, 2).unflatten(2, (release.grid, release.grid))
    torch.testing.assert_close(quantized, release.tensors["quantized"], atol=1e-4, rtol=0)
    pixels = release.image_tokenizer.decode(codes)
    torch.testing.assert_close(pixels, release.tensors["reconstruction"], atol=1e-3, rtol=0)


def test_converted_tokenizer_saves_and_loads(release, tmp_path):
    release.image_tokenizer.save_pretrained(tmp_path)
    loaded = LibraImageTokenizer.from_pretrained(tmp_path)
    codes = release.tensors["codes"].flatten(1, 2)
    assert torch.equal(loaded.decode(codes), release.image_tokenizer.decode(codes))


@pytest.fixture
def copy(release, tmp_path):
    """A writable copy of the image tokenizer's part of the release."""
    folder = tmp_path / "release"
    folder.mkdir()
    for name in ("vision_tokenizer_config.yaml", "vqgan.ckpt"):
        shutil.copyfile(release.folder / name, folder / name)
    return folder


def edit_checkpoint(folder, edit):
    checkpoint = torch.load(folder / "vqgan.ckpt", weights_only=True)
    edit(checkpoint["state_dict"])
    torch.save(checkpoint, folder / "vqgan.ckpt")


def drop_clip(state):
    for key in [key for key in state if key.startswith("encoder.")]:
        del state[key]


def test_clip_weights_come_from_its_folder_when_the_checkpoint_has_none(release, copy):
    edit_checkpoint(copy, drop_clip)
    clip = release.folder / "openai-clip-vit-large-patch14-336"
    tokenizer, _ = load_released(copy, clip=clip)
    expected = release.image_tokenizer.encode(release.tensors["pixel_values"])
    assert torch.equal(tokenizer.encode(release.tensors["pixel_values"]).codes, expected.codes)


def test_clip_nowhere_to_be_found(copy):
    edit_checkpoint(copy, drop_clip)
    with pytest.raises(ValueError, match=r"has no CLIP weights.*--clip"):
        load_released(copy)


def test_unknown_and_missing_keys_are_named(copy, release):
    def edit(state):
        state["decoder.surprise"] = state.pop("post_quant_conv.bias")

    edit_checkpoint(copy, edit)
    message = r"missing keys \['post_quant_conv.bias'\] and unknown keys \['decoder.surprise'\]"
    with pytest.raises(ValueError, match=message):
        load_released(copy, clip=release.folder / "openai-clip-vit-large-patch14-336")


def test_a_wrong_shape_is_named(copy, release):
    def edit(state):
        state["decoder.conv_out.bias"] = torch.zeros(4)

    edit_checkpoint(copy, edit)
    with pytest.raises(ValueError, match=r"decoder.conv_out.bias has shape \(4,\), expected \(3,\)"):
        load_released(copy, clip=release.folder / "openai-clip-vit-large-patch14-336")


def test_options_that_are_not_implemented_are_refused(release):
    config = yaml.safe_load((release.folder / "vision_tokenizer_config.yaml").read_text())
    config["params"]["ddconfig"]["double_z"] = True
    with pytest.raises(ValueError, match="'double_z': True"):
        convert_config(config)
    del config["params"]["ddconfig"]["double_z"], config["params"]["ddconfig"]["ch"]
    with pytest.raises(ValueError, match="lacks ch"):
        convert_config(config)


def test_broken_folders_are_refused(copy, tmp_path):
    with pytest.raises(ValueError, match=r"has no vision_tokenizer_config.yaml"):
        load_released(tmp_path)
    (copy / "vqgan.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"vqgan.ckpt cannot be read"):
        load_released(copy)
    (copy / "vqgan.ckpt").unlink()
    with pytest.raises(ValueError, match=r"vqgan.ckpt does not exist"):
        load_released(copy)
