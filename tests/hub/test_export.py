"""`libra export`: the repository, the dtype of its weights, and what is refused. How it loads is in test_remote_code."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from libra_cli.export import (
    AUTO_MAP,
    CUSTOM_PIPELINES,
    check_shard_size,
    export_folder,
    export_repo,
    new_folder,
    remote_code_files,
    write_code,
)
from libra_cli.loading import load_libra, load_model
from libra_cli.push import plan_push
from libra_cli.quantization import stored_dtype
from tests.modeling.toys import make_config, make_model


@pytest.fixture
def bare(repo, tmp_path) -> Path:
    """What training leaves: a model and a processor as `save_pretrained` writes them, without code and card."""
    model, processor = load_libra(repo)
    for part in (model.config, processor.image_tokenizer.config):
        part.auto_map = None
    model.save_pretrained(tmp_path / "bare")
    processor.save_pretrained(tmp_path / "bare")
    assert not list((tmp_path / "bare").glob("*.py"))
    return tmp_path / "bare"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_repository_is_complete(bare, tmp_path):
    folder = export_folder(bare, tmp_path / "repo")
    config = read_json(folder / "config.json")
    assert config["auto_map"] == AUTO_MAP
    assert config["custom_pipelines"] == CUSTOM_PIPELINES
    processor = read_json(folder / "processor_config.json")
    assert processor["auto_map"] == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    assert processor["image_processor"]["auto_map"] == {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
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
    for reference in [*AUTO_MAP.values(), CUSTOM_PIPELINES["image-to-text"]["impl"]]:
        module, name = reference.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text(encoding="utf-8")


def test_card_is_valid_and_kept(bare, tmp_path):
    made = ModelCard((export_folder(bare, tmp_path / "first") / "README.md").read_text())
    assert (made.data.library_name, made.data.pipeline_tag) == ("transformers", "image-text-to-text")
    (bare / "README.md").write_text("# Mine\n")
    assert (export_folder(bare, tmp_path / "second") / "README.md").read_text() == "# Mine\n"
    assert (export_folder(bare, tmp_path / "third", card="# Other\n") / "README.md").read_text() == "# Other\n"


def test_weights_in_half_precision_load_in_full(bare, tmp_path):
    folder = export_folder(bare, tmp_path / "repo", weights_dtype=torch.float16)
    for part in (folder, folder / "image_tokenizer"):
        stored = load_file(part / "model.safetensors")
        assert {weight.dtype for weight in stored.values()} == {torch.float16}
        assert read_json(part / "config.json")["dtype"] == "float32"
    assert stored_dtype(folder) == torch.float16
    (model, processor), (original, _) = load_libra(folder), load_libra(bare)
    assert model.dtype == processor.image_tokenizer.dtype == torch.float32
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.half().float()), name
        assert weight.dtype == torch.float32


def test_shards_load_as_one_file_does(repo, tmp_path):
    sizes = {"whole": "5GB", "shards": "200KB"}
    folders = {name: export_folder(repo, tmp_path / name, max_shard_size=size) for name, size in sizes.items()}
    for part in ("", "image_tokenizer"):
        assert not list((folders["whole"] / part).glob("model-*"))
        assert len(list((folders["shards"] / part).glob("model-*-of-*.safetensors"))) > 2
        assert not (folders["shards"] / part / "model.safetensors").exists()
    (one, _), (many, _) = (load_libra(folder) for folder in folders.values())
    assert all(torch.equal(weight, many.state_dict()[name]) for name, weight in one.state_dict().items())
    assert plan_push("team/libra-toy", folders["shards"]).problems == []
    assert stored_dtype(folders["shards"]) == stored_dtype(folders["whole"]) == torch.float32


@pytest.mark.parametrize("size", ["0.5GB", "5gb", "1.5KB", "0.001KB"])
def test_what_is_a_shard_size(size):
    check_shard_size(size)


@pytest.mark.parametrize("size", ["0", "0GB", "0.0GB", "0.0001KB", ".5GB", "5", "many", "-1GB"])
def test_what_is_no_shard_size(repo, tmp_path, size):
    with pytest.raises(ValueError, match="largest weights file"):
        export_folder(repo, tmp_path / "repo", max_shard_size=size)


def test_tied_weights_are_stored_once(repo, tmp_path):
    model, (_, processor) = make_model(make_config(text={"tie_word_embeddings": True})), load_libra(repo)
    folder = export_repo(model, processor, tmp_path / "repo", weights_dtype=torch.float16)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load_model(folder).lm_head.weight.dtype == torch.float32


def test_weights_too_large_for_the_dtype(bare, tmp_path):
    model, processor = load_libra(bare)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        export_repo(model, processor, tmp_path / "repo", weights_dtype=torch.float16)
    assert not [path for path in tmp_path.iterdir() if "repo" in path.name]


def test_exporting_an_export_changes_nothing(repo, tmp_path):
    folder = export_folder(repo, tmp_path / "repo")
    texts = [path.relative_to(repo) for path in repo.rglob("*") if "safetensors" not in path.name and path.is_file()]
    assert len(texts) > len(remote_code_files())
    for path in texts:
        assert (folder / path).read_text() == (repo / path).read_text(), path


def test_code_is_brought_up_to_date(repo, tmp_path):
    folder = export_folder(repo, tmp_path / "repo")
    (folder / "modeling_libra.py").write_text("old")
    (folder / "handler.py").write_text("mine")
    assert write_code(folder) == ["handler.py"]
    assert (folder / "handler.py").read_text() == "mine"
    assert {path.name for path in folder.glob("*.py")} == {
        "handler.py",
        *(path.name for path in remote_code_files()),
    }
    assert (folder / "modeling_libra.py").read_text() == (repo / "modeling_libra.py").read_text()
    (folder / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"no processor_config\.json"):
        write_code(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", "must hold a JSON object"),
        ("config.json", '{"model_type": "llama"}', "of type 'llama'; expected 'libra'"),
        ("image_tokenizer/config.json", '{"model_type": "clip"}', "expected 'libra_image_tokenizer'"),
        ("processor_config.json", "{}", "has no image_processor"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
    ],
)
def test_code_is_not_put_into_what_is_no_libra(repo, tmp_path, name, content, message):
    folder = Path(shutil.copytree(repo, tmp_path / "repo"))
    (folder / "modeling_libra.py").write_text("old")
    (folder / name).write_text(content)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=re.escape(message)):
        write_code(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_code_of_others_is_named_no_more(repo, tmp_path):
    folder = Path(shutil.copytree(repo, tmp_path / "repo"))
    tokenizer = read_json(folder / "tokenizer_config.json") | {"auto_map": {"AutoTokenizer": ["evil/x--t.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    write_code(folder)
    assert "auto_map" not in read_json(folder / "tokenizer_config.json")


def test_missing_weights_are_not_made_up(bare, tmp_path):
    weights = load_file(bare / "model.safetensors")
    del weights["vision_lm_head.0.weight"]
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: vision_lm_head\.0\.weight"):
        export_folder(bare, tmp_path / "repo")


def test_folder_that_is_no_repository(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        export_folder(tmp_path / "empty", tmp_path / "repo")
    with pytest.raises(ValueError, match="no folder"):
        export_folder(tmp_path / "absent", tmp_path / "repo")


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "file").is_file()
    (tmp_path / "kept").mkdir()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "kept"):
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "made"]


def test_export_into_the_folder_one_is_in(repo, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_folder(repo, ".")
    assert Path("config.json").is_file()  # the folder itself was not replaced
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    with pytest.raises(ValueError, match="not empty"):
        export_folder(repo, ".")


def test_card_names_the_folder_one_is_in(bare, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_folder(bare, ".")
    assert "\n# here\n" in Path("README.md").read_text()


def test_destination_in_use(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not a folder"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(ValueError, match="not empty"), new_folder(tmp_path):
        pass
