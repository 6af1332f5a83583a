"""`libra init`: the language model stays itself, in each family; the repository is whole; what cannot be used is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from libra_cli.export import remote_code_files
from libra_cli.init import init_libra, init_repo
from libra_cli.loading import load_libra
from libra_cli.main import main
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from tests.conftest import REPOSITORY
from tests.hub.test_remote_code import run_fresh
from tests.parts import FAMILIES, TOKENIZER_FIELDS, make_clip, make_llm

KEY = str(REPOSITORY / "samples" / "key.png")
TEXTS = ["a key is a thing that opens a door.", "two", "a text\nof two lines"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def parts(golden, clip, tmp_path_factory) -> SimpleNamespace:
    """A Llama, the CLIP, and a Libra made of both. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("parts")
    llm = make_llm(folder / "llm", "llama", golden)
    return SimpleNamespace(llm=llm, clip=clip, libra=init_repo(llm, clip, folder / "libra", **TOKENIZER_FIELDS))


@pytest.fixture
def copies(parts, tmp_path) -> SimpleNamespace:
    """The parts, to be broken."""
    for name in ("llm", "clip"):
        shutil.copytree(getattr(parts, name), tmp_path / name)
    return SimpleNamespace(llm=tmp_path / "llm", clip=tmp_path / "clip", dst=tmp_path / "libra")


def edit(path: Path, **fields) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | fields), encoding="utf-8")


# ---- the language model stays itself ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_the_bare_language_models(family, dtype, golden, clip, tmp_path):
    llm = make_llm(tmp_path / "llm", family, golden, dtype)
    model, processor = load_libra(init_repo(llm, clip, tmp_path / "libra", **TOKENIZER_FIELDS))
    bare = AutoModelForCausalLM.from_pretrained(llm).eval()
    assert model.dtype == bare.dtype == dtype
    assert model.config.text_config.to_dict() | {"_name_or_path": ""} == bare.config.to_dict() | {"_name_or_path": ""}

    inputs = processor(text=TEXTS, return_tensors="pt")
    ids = AutoTokenizer.from_pretrained(llm)(TEXTS)["input_ids"]
    assert [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])] == ids
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, bare(**inputs).logits)
    written = [m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (model, bare)]
    assert torch.equal(*written)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_weights_are_stored_unchanged(family, golden, clip, tmp_path):
    llm = make_llm(tmp_path / "llm", family, golden, torch.bfloat16)
    stored = load_file(init_repo(llm, clip, tmp_path / "libra", **TOKENIZER_FIELDS) / "model.safetensors")
    base = load_file(llm / "model.safetensors")
    names = {name: name.replace("model.", "model.language_model.", 1) for name in base}
    assert {name for name in stored if "vision" not in name} == set(names.values())
    assert ("lm_head.weight" in stored) == (family != "qwen2")  # ours is tied
    for name, weight in base.items():
        assert torch.equal(stored[names[name]], weight), name
        assert stored[names[name]].dtype == torch.bfloat16


def test_generation_settings_are_taken_over(copies):
    (copies.llm / "generation_config.json").write_text('{"do_sample": true, "top_k": 7, "eos_token_id": [2, 5]}')
    model, _ = init_libra(copies.llm, copies.clip, **TOKENIZER_FIELDS)
    assert (model.generation_config.do_sample, model.generation_config.top_k) == (True, 7)
    assert model.generation_config.eos_token_id == [2, 5]


def test_shards_and_old_buffers(parts, copies):
    bare = AutoModelForCausalLM.from_pretrained(copies.llm)
    (copies.llm / "model.safetensors").unlink()
    bare.save_pretrained(copies.llm, max_shard_size="20kB")
    first = next(copies.llm.glob("model-00001-*"))
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # in checkpoints of transformers 4.30
    save_file(load_file(first) | buffer, first, metadata={"format": "pt"})
    model, _ = init_libra(copies.llm, copies.clip, **TOKENIZER_FIELDS)
    expected, _ = load_libra(parts.libra)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in expected.state_dict().items())


# ---- the vision system is new ----


def test_the_seed_gives_the_new_parameters(parts):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    (first, one), (second, two), (third, three) = (
        init_libra(parts.llm, parts.clip, seed, **TOKENIZER_FIELDS) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    for is_given, a, b, c in (
        (lambda name: "vision" not in name, first, second, third),
        (lambda name: name.startswith("clip."), one.image_tokenizer, two.image_tokenizer, three.image_tokenizer),
    ):
        for name, weight in a.state_dict().items():
            assert torch.equal(weight, b.state_dict()[name]), name
            if is_given(name) or (weight.ndim == 2 and weight.any()):  # norms, biases and bridges start at constants
                assert torch.equal(weight, c.state_dict()[name]) == is_given(name), name


def test_the_bridge_starts_closed(parts):
    model, _ = load_libra(parts.libra)
    bridges = {name: weight for name, weight in model.state_dict().items() if "bridge" in name}
    assert len(bridges) == 2 * 2 * 4
    assert all(weight.any() == (".A." in name) for name, weight in bridges.items())


def test_a_trained_image_tokenizer_is_used_as_it_is(parts, tmp_path):
    expected, processor = load_libra(parts.libra)
    processor.image_tokenizer.save_pretrained(tmp_path / "trained")
    processor.image_processor.save_pretrained(tmp_path / "trained")
    for place in (tmp_path / "trained", parts.libra):
        model, made = init_libra(parts.llm, place, seed=5)
        assert model.config.feature_size == expected.config.feature_size
        for name, weight in processor.image_tokenizer.state_dict().items():
            assert torch.equal(weight, made.image_tokenizer.state_dict()[name]), name
        with pytest.raises(ValueError, match=r"select_layers cannot be chosen: .* is trained already"):
            init_libra(parts.llm, place, select_layers=[1, 2])


def test_sizes_follow_the_clip(parts):
    fields = {name: value for name, value in TOKENIZER_FIELDS.items() if name != "ch_mult"}
    model, processor = init_libra(parts.llm, parts.clip, select_layers=[1, 3], **fields)
    tokenizer = processor.image_tokenizer.config
    assert (model.config.image_grid, model.config.feature_size, model.config.codebook_size) == (4, 64, 16)
    assert (tokenizer.decoder_resolutions, list(tokenizer.attn_resolutions)) == ([4, 8, 16, 32], [4])
    model, _ = init_libra(parts.llm, parts.clip, **TOKENIZER_FIELDS)
    assert model.config.feature_size == 4 * 32


def test_settings_of_old_clip_repositories(copies):
    make_clip(copies.clip, {"size": 32, "crop_size": 32})  # as openai/clip-vit-base-patch32 has them
    _, processor = init_libra(copies.llm, copies.clip, **TOKENIZER_FIELDS)
    assert processor(images=KEY, return_tensors="pt")["image_features"].shape == (1, 16, 128)


def test_tokenizers_that_put_a_space_after_special_tokens(copies):
    """As Mistral-7B-v0.1 and Vicuna have it: text is read as before, but not the newline after an image."""
    edit(copies.llm / "tokenizer_config.json", legacy=True)
    _, processor = init_libra(copies.llm, copies.clip, **TOKENIZER_FIELDS)
    legacy = AutoTokenizer.from_pretrained(copies.llm)
    assert legacy.legacy
    assert processor(text=TEXTS)["input_ids"] == legacy(TEXTS)["input_ids"]
    ids = processor(text="<image>\nA", images=KEY)["input_ids"][0]
    assert ids[18:] == [processor.eoi_token_id, 13, legacy.convert_tokens_to_ids("A")]


# ---- the repository ----


def test_repository_is_complete(parts):
    written = {str(path.relative_to(parts.libra)) for path in parts.libra.rglob("*") if path.is_file()}
    assert written == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "image_tokenizer/config.json",
        "image_tokenizer/model.safetensors",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *(file.name for file in remote_code_files()),
    }
    texts = [path for path in parts.libra.rglob("*") if path.suffix in (".json", ".md", ".jinja")]
    assert not [path.name for path in texts if str(parts.llm.parent) in path.read_text(encoding="utf-8")]
    assert "base_model" not in (parts.libra / "README.md").read_text(encoding="utf-8")  # a folder is no Hub id


def test_it_loads_as_remote_code_without_a_beginning_token(golden, clip, tmp_path):
    """Qwen's tokenizer, in a process that knows nothing of this package: questions, captions, drawing."""
    llm = make_llm(tmp_path / "llm", "qwen2", golden)
    folder = init_repo(llm, clip, tmp_path / "libra", **TOKENIZER_FIELDS)
    run = run_fresh(str(folder), tmp_path / "out", golden, tmp_path)
    assert run.classes["AutoModelForImageTextToText"] == "LibraForCausalLM"
    assert run.classes["AutoTokenizer"] == "Qwen2Tokenizer"
    first = run.tensors["input_ids"][0][run.tensors["attention_mask"][0].bool()].tolist()
    start = AutoTokenizer.from_pretrained(llm)("A chat between a curious user and")["input_ids"]
    assert first[: len(start)] == start
    image = first.index(384 + 16**2)  # BOI
    assert first[image + 17 : image + 19] == [384 + 16**2 + 1, ord("\n")]
    assert run.tensors["t2i_generated"].shape[1] == run.tensors["t2i_input_ids"].shape[1] + 25
    assert run.tensors["t2i_size"].tolist() == [32, 32]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_captions_and_chats(family, golden, clip, tmp_path, capsys):
    llm = make_llm(tmp_path / "llm", family, golden)
    folder = init_repo(llm, clip, tmp_path / "libra", **TOKENIZER_FIELDS)
    for question in ([], ["--prompt", "What is it?"]):
        assert main(["caption", KEY, "--model", str(folder), "--max-new-tokens", "4", *question]) == 0
        assert capsys.readouterr().out.startswith(KEY)


def test_command(parts, copies, capsys):
    (copies.llm.parent / "card.md").write_text("# Mine\n")
    arguments = [str(parts.llm), str(parts.libra), str(copies.dst), "--card", str(copies.llm.parent / "card.md")]
    assert main(["init", *arguments, "--seed", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"Wrote {copies.dst}\n"
    assert "untrained" not in printed.err
    assert (copies.dst / "README.md").read_text() == "# Mine\n"
    made, _ = load_libra(copies.dst)
    expected, _ = init_libra(parts.llm, parts.libra, seed=4)
    assert all(torch.equal(weight, made.state_dict()[name]) for name, weight in expected.state_dict().items())


# ---- what is refused, before weights are read ----


def broken_llm_type(copies):
    shutil.rmtree(copies.llm)
    GPT2Config().save_pretrained(copies.llm)


def without_eos(copies):
    edit(copies.llm / "tokenizer_config.json", eos_token=None)


def without_tokenizer(copies):
    for path in copies.llm.glob("tokenizer*"):
        path.unlink()


def with_merged_newlines(copies):
    content = json.loads((copies.llm / "tokenizer.json").read_text())
    merged = {"id": 370, "content": "\nA", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(merged | {"normalized": False, "special": False})
    (copies.llm / "tokenizer.json").write_text(json.dumps(content))


REFUSED = {
    "type": (broken_llm_type, r"model type 'gpt2'; a plain language model of type llama, mistral, qwen2, qwen3"),
    "quantized": (
        lambda c: edit(c.llm / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized; use the repository with its full weights",
    ),
    "no config": (lambda c: (c.llm / "config.json").unlink(), r"it has no config\.json"),
    "no tokenizer": (without_tokenizer, r"has no tokenizer: none of tokenizer\.json"),
    "no eos": (without_eos, "has no end-of-sequence token"),
    "newline": (with_merged_newlines, r"as an image and \['\\nA'\]\. Libra forces a newline after every image"),
    "tokenizer too large": (lambda c: edit(c.llm / "config.json", vocab_size=300), "text_vocab_size is 300"),
    "clip type": (
        lambda c: edit(c.clip / "config.json", model_type="siglip"),
        r"model type 'siglip'; a CLIP \(clip, clip_vision_model\) or a trained image tokenizer",
    ),
    "image processor": (lambda c: (c.clip / "preprocessor_config.json").unlink(), "has no image processor"),
    "not a square": (
        lambda c: edit(c.clip / "config.json", vision_config={"image_size": [32, 48], "patch_size": 8}),
        r"image_size must be an integer multiple of vision_config\.patch_size, got image_size=\[32, 48\]",
    ),
    "patches cut": (
        lambda c: edit(c.clip / "config.json", vision_config={"image_size": 30, "patch_size": 8}),
        "got image_size=30 and patch_size=8",
    ),
    "shallow": (
        lambda c: edit(c.clip / "config.json", vision_config={"num_hidden_layers": 3, "image_size": 32}),
        "A CLIP of 3 layers has no 4 different ones .* name the hidden states to use with select_layers",
    ),
    "pixels": (
        lambda c: edit(c.clip / "preprocessor_config.json", crop_size={"height": 40, "width": 40}),
        "reads 32 x 32 pixels, but the image processor makes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, copies, monkeypatch):
    break_it, message = REFUSED[what]
    break_it(copies)
    monkeypatch.setattr("libra_cli.init.fresh_vision_system", lambda *_: pytest.fail("the language model was read"))
    with pytest.raises((ValueError, OSError), match=message):
        init_repo(copies.llm, copies.clip, copies.dst, **TOKENIZER_FIELDS)
    assert not copies.dst.exists()


def rename(name: str, new: str):
    def change(copies):
        weights = load_file(copies.llm / "model.safetensors")
        weights[new] = weights.pop(name)
        save_file(weights, copies.llm / "model.safetensors", metadata={"format": "pt"})

    return change


BROKEN_WEIGHTS = {
    "none": (lambda c: (c.llm / "model.safetensors").unlink(), "A language model in safetensors is expected"),
    "pointer": (
        lambda c: (c.llm / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        "is not a whole safetensors file",
    ),
    "headless": (rename("lm_head.weight", "score.weight"), r"missing: lm_head\.weight; unknown: score\.weight"),
    "shape": (
        lambda c: edit(c.llm / "config.json", intermediate_size=72),
        r"gate_proj\.weight is \(64, 32\), expected \(72, 32\)",
    ),
}


@pytest.mark.parametrize("what", BROKEN_WEIGHTS)
def test_broken_weights(what, copies):
    break_it, message = BROKEN_WEIGHTS[what]
    break_it(copies)
    with pytest.raises((ValueError, OSError), match=message):
        init_repo(copies.llm, copies.clip, copies.dst, **TOKENIZER_FIELDS)
    assert not copies.dst.exists()


def test_gaps_in_the_clip_are_not_filled(copies):
    weights = load_file(copies.clip / "model.safetensors")
    (name,) = [name for name in weights if name.startswith("vision_model") and "layers.1.mlp.fc1.bias" in name]
    del weights[name]
    save_file(weights, copies.clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: .*layers\.1\.mlp\.fc1\.bias"):
        init_repo(copies.llm, copies.clip, copies.dst, **TOKENIZER_FIELDS)


def test_destination_in_use(parts, monkeypatch):
    monkeypatch.setattr("libra_cli.init.init_libra", lambda *_: pytest.fail("something was read"))
    with pytest.raises(ValueError, match="not empty"):
        init_repo(parts.llm, parts.clip, parts.libra)


def test_an_untrained_image_tokenizer_is_pointed_out(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("libra_cli.init.init_repo", lambda *_: tmp_path)  # the release's decoder is large
    assert main(["init", str(parts.llm), str(parts.clip), str(tmp_path)]) == 0
    assert "Its image tokenizer is untrained" in capsys.readouterr().err


def test_mistakes_on_the_command_line(parts, copies, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments, message in (
        ([str(copies.llm / "absent"), str(parts.clip), str(copies.dst)], "There is no folder"),
        (["libra-team/absent", str(parts.clip), str(copies.dst)], "libra-team/absent cannot be read"),
        ([str(parts.llm), str(parts.clip), str(copies.dst), "--select-layers", "9"], "between 0 (embeddings) and"),
    ):
        assert main(["init", *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("libra: error: ")]
        assert message in line


def test_image_tokenizer_of_a_clip_runs_no_deeper_than_needed(parts):
    made = init_libra(parts.llm, parts.clip, select_layers=[1, 2], **TOKENIZER_FIELDS)[1].image_tokenizer
    assert isinstance(made, LibraImageTokenizer)
    assert len(made.clip.encoder.layers) == 2
