"""`libra convert`: what it writes, what it refuses, and how much it holds in memory."""

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from libra_cli import convert
from libra_cli.convert import INDEX, convert_release
from libra_cli.loading import load_libra
from modeling_libra import LibraConfig, LibraForCausalLM

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def broken(release, tmp_path) -> Path:
    """A copy of the release for a test to break."""
    folder = tmp_path / "release"
    shutil.copytree(release, folder)
    for path in [folder, *folder.rglob("*")]:
        os.chmod(path, 0o755)
    return folder


def edit_json(path: Path, **fields) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_shard(folder: Path, name: str, change) -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name)


def reshard(folder: Path, count: int) -> list[str]:
    """Spreads the weights of a release over `count` shards; returns their names."""
    weights = {}
    for name in SHARDS:
        weights |= load_file(folder / name)
        (folder / name).unlink()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        save_file({key: weights[key] for key in sorted(weights)[i::count]}, folder / name)
    weight_map = {key: names[i % count] for i, key in enumerate(sorted(weights))}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def assert_refused(src: Path, *named: str, **options) -> None:
    """Conversion raises a ValueError that names everything in `named`, and leaves nothing behind."""
    parent = src.parent / "converted"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        convert_release(src, parent / "repo", **options)
    for text in named:
        assert text in str(caught.value)
    assert not parent.exists() or not list(parent.iterdir())


def test_index_and_shards_of_the_repository(repo):
    index = json.loads((repo / INDEX).read_text())
    model = LibraForCausalLM(LibraConfig.from_pretrained(repo))
    assert index["weight_map"].keys() == model.state_dict().keys()
    sizes = 0
    for name in set(index["weight_map"].values()):
        with safe_open(repo / name, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert {key for key, file in index["weight_map"].items() if file == name} == set(shard.keys())
        sizes += sum(weight.nbytes for weight in load_file(repo / name).values())
    assert index["metadata"]["total_size"] == sizes


def test_configurations_of_the_repository(repo):
    config = LibraConfig.from_pretrained(repo)
    assert (config.text_vocab_size, config.image_grid, config.feature_size) == (360, 4, 64)
    assert config.architectures == ["LibraForCausalLM"]
    assert json.loads((repo / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = json.loads((repo / "tokenizer_config.json").read_text())
    assert (tokenizer["pad_token"], tokenizer["model_max_length"]) == ("<unk>", 256)
    assert (repo / "chat_template.jinja").is_file()
    assert (repo / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize("dropped", ["tokenizer.json", "tokenizer.model"])
def test_one_form_of_the_tokenizer_is_enough(broken, dropped, repo, tmp_path):
    (broken / dropped).unlink()
    converted = convert_release(broken, tmp_path / "repo")
    text = "A chat: USER: <image>\nWhat is it? ASSISTANT:"
    ids = [load_libra(folder)[1].tokenizer(text)["input_ids"] for folder in (repo, converted)]
    assert ids[0] == ids[1]


def test_clip_from_another_folder(broken, tmp_path):
    inside = broken / "openai-clip-vit-large-patch14-336"
    inside.rename(tmp_path / "clip")
    checkpoint = torch.load(broken / "vqgan.ckpt", weights_only=True)
    state = {key: w for key, w in checkpoint["state_dict"].items() if not key.startswith("encoder.vision_tower.")}
    torch.save({"state_dict": state}, broken / "vqgan.ckpt")
    converted = convert_release(broken, tmp_path / "repo", clip=tmp_path / "clip")
    assert (converted / "image_tokenizer" / "model.safetensors").is_file()


def test_card_and_caption_prompt(broken, tmp_path):
    folder = convert_release(broken, tmp_path / "repo", card="# Mine\n", caption_prompt="Describe it.")
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert load_libra(folder)[1].caption_prompt == "Describe it."


def test_single_file_without_index(broken, repo, tmp_path):
    (name,) = reshard(broken, 1)
    (broken / name).rename(broken / "model.safetensors")
    (broken / INDEX).unlink()
    folder = convert_release(broken, tmp_path / "repo")
    assert not (folder / INDEX).exists()
    expected = load_file(repo / SHARDS[0]) | load_file(repo / SHARDS[1])
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_one_shard_in_memory_at_a_time(broken, tmp_path, monkeypatch):
    reshard(broken, 8)
    alive, most = weakref.WeakSet(), 0
    read = convert.read_weights

    def tracked(shard):
        nonlocal most
        weights = read(shard)
        alive.update(weights.values())
        most = max(most, len(alive) / len(weights))
        return weights

    monkeypatch.setattr(convert, "read_weights", tracked)
    convert_release(broken, tmp_path / "repo")
    assert most == 1  # nothing of an earlier shard was alive when one was read


def test_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "config.json", "empty")


def test_missing_shard(broken):
    (broken / SHARDS[1]).unlink()
    assert_refused(broken, SHARDS[1], "download complete")


@pytest.mark.parametrize("size", [0, 100, 500_000])
def test_shard_cut_short(broken, size):
    data = (broken / SHARDS[0]).read_bytes()
    (broken / SHARDS[0]).write_bytes(data[:size])
    assert_refused(broken, SHARDS[0], "not a whole safetensors file")


def test_pointer_instead_of_a_shard(broken):
    (broken / SHARDS[0]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert_refused(broken, SHARDS[0], "pointer")


def test_missing_weight(broken):
    edit_shard(broken, SHARDS[1], lambda weights: weights.pop("model.vision_norm.weight"))
    assert_refused(broken, SHARDS[1], "model.vision_norm.weight", "promises")


def test_weight_missing_from_index_too(broken):
    key = "model.vision_norm.weight"
    edit_shard(broken, SHARDS[1], lambda weights: weights.pop(key))
    weight_map = json.loads((broken / INDEX).read_text())["weight_map"]
    del weight_map[key]
    edit_json(broken / INDEX, weight_map=weight_map)
    assert_refused(broken, "missing", "model.vision_model.norm.weight")


def test_unknown_weights(broken):
    extra = {"model.layers.0.self_attn.vision_surprise.weight": torch.zeros(2), "ema.decay": torch.zeros(1)}
    edit_shard(broken, SHARDS[0], lambda weights: weights.update(extra))
    assert_refused(broken, *extra)


def test_weight_in_two_shards(broken):
    edit_shard(broken, SHARDS[0], lambda weights: weights.update({"model.norm.weight": torch.ones(64)}))
    assert_refused(broken, "more than one shard", "model.language_model.norm.weight")


def test_weight_of_a_wrong_shape(broken):
    edit_shard(broken, SHARDS[1], lambda weights: weights.update({"model.norm.weight": torch.ones(65)}))
    assert_refused(broken, "wrong shape", "model.language_model.norm.weight", "(65,)", "(64,)")


def test_configuration_of_more_layers(broken):
    edit_json(broken / "config.json", num_hidden_layers=4)
    assert_refused(broken, "missing", "layers.3.")


def test_configuration_with_an_option_we_lack(broken):
    edit_json(broken / "config.json", use_2d_rope=True)
    assert_refused(broken, "use_2d_rope")


def test_invalid_json(broken):
    (broken / "config.json").write_text("{")
    assert_refused(broken, "config.json", "JSON")


def test_no_tokenizer(broken):
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer.model").unlink()
    assert_refused(broken, "tokenizer.model")


def test_broken_image_tokenizer(broken):
    (broken / "vqgan.ckpt").write_bytes(b"not a checkpoint")
    assert_refused(broken, "vqgan.ckpt")


def test_failure_while_writing(broken, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(convert, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        convert_release(broken, broken.parent / "converted" / "repo")
    assert not list((broken.parent / "converted").iterdir())


def test_destination_in_use(broken, tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert_release(broken, tmp_path / "repo")
    assert [path.name for path in (tmp_path / "repo").iterdir()] == ["mine.txt"]
