"""`libra push`: what it says, what it refuses, and what arrives. The real client of the Hub talks to a stand-in of it."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from libra_cli import push as push_module
from libra_cli.export import card_of, export_folder
from libra_cli.loading import load_model
from libra_cli.main import main
from libra_cli.push import plan_push, push, size_text
from libra_cli.quantization import quantized_card, stored_dtype
from tests.hub.stand_in_hub import TOKEN, StandInHub

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "hub_configs" / "libra-tiny"


@pytest.fixture(scope="module")
def server():
    hub = StandInHub()
    yield hub
    hub.close()


@pytest.fixture
def hub(server, monkeypatch) -> StandInHub:
    """The stand-in, empty, and the client in this process sent to it."""
    for kept in (server.repos, server.private, server.blobs, server.uploads):
        kept.clear()
    server.failing_uploads = 0
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet is a protocol of its own, which the stand-in lacks
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture
def cached_hub(hub, monkeypatch, tmp_path) -> StandInHub:
    """The same, to load from; the cache is the test's own."""
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


@pytest.fixture
def folder(repo, tmp_path) -> Path:
    """A complete repository for a test to break."""
    shutil.copytree(repo, tmp_path / "libra-toy")
    card = (ROOT / "hub_configs" / "libra-11b-chat" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "libra-toy" / "README.md").write_text(card, encoding="utf-8")
    return tmp_path / "libra-toy"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_shows_every_file_and_sends_nothing(hub, capsys):
    assert main(["push", "team/libra-tiny", "--folder", str(TINY)]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = contents(TINY)
    assert {line.split()[-1] for line in lines[: len(files)]} == files.keys()
    assert lines[0].split() == [*size_text(len(files["README.md"])).split(), "README.md"]
    assert f"{len(files)} files" in lines[-2]
    assert lines[-2].startswith(f"{size_text(sum(map(len, files.values()))):>10}")
    assert lines[-1] == "Nothing was sent; add --yes to push."
    assert not hub.repos


def test_what_is_pushed_is_the_folder(hub, capsys):
    assert main(["push", "team/libra-tiny", "--folder", str(TINY), "--yes", "--private"]) == 0
    assert hub.files("team/libra-tiny") == contents(TINY)
    assert hub.private == {"team/libra-tiny"}
    assert f"{hub.url}/team/libra-tiny/commit/" in capsys.readouterr().out


def test_an_interrupted_push_is_resumed(hub):
    plan = plan_push("team/libra-tiny", TINY)
    hub.failing_uploads = 1
    with pytest.raises(OSError, match="lost this one"):
        push(plan)
    assert not hub.files("team/libra-tiny")
    sent = list(hub.uploads)
    push(plan)
    assert hub.files("team/libra-tiny") == contents(TINY)
    large = [len(content) for content in contents(TINY).values() if len(content) >= 100_000]
    assert sorted(hub.uploads) == sorted(large)  # each once: what had arrived before the failure was not sent again
    push(plan)
    assert len(hub.uploads) == len(large)
    assert len(sent) < len(large)


def test_not_logged_in(hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.utils._auth.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    assert main(["push", "team/libra-tiny", "--folder", str(TINY), "--yes"]) == 2
    assert "401" in capsys.readouterr().err
    assert not hub.repos


def test_card_that_the_hub_refuses(hub, folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.replace("\n- en\n", "\n- unheard-of\n"), encoding="utf-8")
    with pytest.raises(ValueError, match="language"):
        push(plan_push("team/libra-toy", folder))
    assert not hub.files("team/libra-toy")


def test_files_of_other_programs_stay_here(folder):
    for name in (".git/config", ".cache/huggingface/x.metadata", "__pycache__/modeling_libra.pyc", ".DS_Store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    plan = plan_push("team/libra-toy", folder)
    assert plan.problems == []
    assert len(plan.left_out) == 4
    assert not {file.name for file in plan.files} & set(plan.left_out)


def write(name: str, content: bytes = b"x"):
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def replace(name: str, old: str, new: str):
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


def edit(name: str, change):
    """Changes the object in a JSON file."""

    def run(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return run


def zip_with_a_pickle(name: str):
    """As torch writes it."""

    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}))

    return change


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def edit_weights(part: str, change):
    def edit(folder: Path) -> None:
        file = sorted((folder / part).glob("*.safetensors"))[-1]
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return edit


def fill_with_nan(weights):
    weights[min(weights)].fill_(torch.nan)


def link_outside(folder: Path) -> None:
    (folder.parent / "mine.txt").write_text("mine")
    (folder / "notes.txt").symlink_to(folder.parent / "mine.txt")


SHARD = "model-00002-of-00002.safetensors"

# Found without loading anything, and all of them at once.
REFUSED_FILES = {
    "training_args.bin is a pickle": write("training_args.bin"),
    "checkpoint/optimizer.pt is a pickle": write("checkpoint/optimizer.pt"),
    "model.PT is a pickle": write("model.PT", pickle.dumps({})),
    "opt.pt2 is a pickle": write("opt.pt2"),
    "opt.npy is a pickle": write("opt.npy"),
    "weights.dat is a pickle": write("weights.dat", pickle.dumps({})),
    "image_tokenizer/more.safetensors is a pickle": write("image_tokenizer/more.safetensors", pickle.dumps({})),
    "array.dat is a pickle": write("array.dat", b"\x93NUMPY\x01\x00"),
    "archive.dat is a pickle": zip_with_a_pickle("archive.dat"),
    "custom_generate/generate.py; remove it": write("custom_generate/generate.py"),
    ".env looks like a file of secrets": write(".env"),
    "token looks like a file of secrets": write("token"),
    "image_tokenizer/deploy.pem looks like a file of secrets": write("image_tokenizer/deploy.pem"),
    "notes.md holds a private key": write("notes.md", b"-----BEGIN RSA PRIVATE KEY-----"),
    "README.md holds a token of the Hugging Face Hub": replace("README.md", "## Use", "hf_" + "a" * 34),
    "image_tokenizer/x.incomplete looks unfinished": write("image_tokenizer/x.incomplete"),
    "notes.txt is a link to a file outside": link_outside,
    "run: libra update-code": replace("modeling_libra.py", "import", "import  "),
    "pipeline_libra.py": remove("pipeline_libra.py"),
    "it has no tokenizer_config.json": remove("tokenizer_config.json"),
}

REFUSED_CARDS = {
    "README.md, the model card, is missing": remove("README.md"),
    "lacks license, library_name, pipeline_tag": write("README.md", b"# Mine\n"),
    "card (while": write("README.md", b"---\na: [\n---\n"),
    "card ('utf-8'": write("README.md", b"\xff\xfe"),
    "has license 'nonsense'": write("README.md", b"---\nlicense: nonsense\n---\n"),
    "has pipeline_tag 'nonsense'": write("README.md", b"---\npipeline_tag: nonsense\n---\n"),
    "has base_model '../x'": write("README.md", b"---\nbase_model: ../x\n---\n"),
    "has the value 'abc' of the metric accuracy": write(
        "README.md",
        b"---\nmodel-index: [{name: x, results: [{task: {type: x}, dataset: {name: x, type: x}, "
        b"metrics: [{type: accuracy, value: abc}]}]}]\n---\n",
    ),
}

MODEL_CODE = "modeling_libra.LibraForCausalLM"

REFUSED_CONFIGURATIONS = {
    "its config.json names other code": edit("config.json", lambda c: c["auto_map"].update(AutoModel="evil/x--m.Evil")),
    "its config.json names other code than this version's, or none, in custom_pipelines": edit(
        "config.json", lambda c: c["custom_pipelines"]["image-to-text"].update(impl="evil.Evil")
    ),
    "text_config.auto_map": edit("config.json", lambda c: c["text_config"].update(auto_map={"AutoModel": MODEL_CODE})),
    "its processor_config.json names other code": edit(
        "processor_config.json", lambda c: c["image_processor"]["auto_map"].update(AutoImageProcessor="evil/x--p.Evil")
    ),
    "its tokenizer_config.json names other code": edit(
        "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil/x--t.Evil", None]})
    ),
    "its image_tokenizer/config.json names other code": edit(
        "image_tokenizer/config.json", lambda c: c["auto_map"].update(AutoModel=MODEL_CODE)
    ),
    "generation_config.json is not valid JSON": write("generation_config.json", b"{nonsense"),
    "does not know: use_3d_bridge": edit("config.json", lambda c: c.update(use_3d_bridge=True)),
    "a later generation": edit("config.json", lambda c: c.update(transformers_version="99.0.0")),
    "rope_theta must be greater than 0": edit(
        "config.json", lambda c: c["text_config"]["rope_parameters"].update(rope_theta=0.0)
    ),
    "mean must have 3 elements": edit(
        "processor_config.json", lambda c: c["image_processor"].update(image_mean=[0, 0])
    ),
    "NaN or infinite numbers of an image": edit(
        "processor_config.json", lambda c: c["image_processor"].update(image_std=[0, 0, 0])
    ),
}

REFUSED = {
    "missing shard": (remove(SHARD), f"lacks the shards {SHARD}"),
    "shard cut short": (cut(SHARD), "not a whole safetensors file"),
    "shard of another export": (
        lambda folder: shutil.copy(folder / SHARD, folder / "model.safetensors"),
        "weights that no index names",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        "has no weights",
    ),
    "index that is no JSON": (write("model.safetensors.index.json"), "is not valid JSON"),
    "index that leads elsewhere": (
        replace("model.safetensors.index.json", SHARD, f"../{SHARD}"),
        "a file beside the index is expected",
    ),
    "weight missing": (
        edit_weights("image_tokenizer", lambda weights: weights.pop("pre_quant.bias")),
        "missing keys: pre_quant.bias",
    ),
    "not a number": (edit_weights("", fill_with_nan), "NaN or infinite numbers"),
    "not a number in the image tokenizer": (edit_weights("image_tokenizer", fill_with_nan), "NaN or infinite numbers"),
    "no processor": (remove("processor_config.json"), "it has no processor_config.json"),
    "tokenizer of another model": (
        replace("processor_config.json", '"text_vocab_size": 360', '"text_vocab_size": 361'),
        "text ids: 360 and 361",
    ),
    "broken tokenizer": (write("tokenizer.json", b"{"), "tokenizer"),
    "configuration without code": (replace("config.json", '"auto_map"', '"map"'), "in auto_map; remove"),
    "language model we cannot route": (
        replace("config.json", '"model_type": "llama"', '"model_type": "gpt2"'),
        "gpt2",
    ),
}


def test_refused_files(hub, folder):
    for change in REFUSED_FILES.values():
        change(folder)
    problems = "; ".join(plan_push("team/libra-toy", folder).problems)
    assert [message for message in REFUSED_FILES if message not in problems] == []


def test_refused_cards(tmp_path):
    for message, change in REFUSED_CARDS.items():
        write("README.md", b"x")(tmp_path)
        change(tmp_path)
        assert message in "; ".join(plan_push("team/libra-toy", tmp_path).problems)


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(hub, folder, change, message):
    change(folder)
    plan = plan_push("team/libra-toy", folder)
    assert message in "; ".join(plan.problems)
    with pytest.raises(ValueError, match="cannot be pushed"):
        push(plan)
    assert not hub.repos


@pytest.mark.parametrize(("message", "change"), REFUSED_CONFIGURATIONS.items())
def test_refused_configurations(folder, message, change):
    change(folder)
    assert message in "; ".join(plan_push("team/libra-toy", folder).problems)


def on_hub(server: StandInHub, repo_id: str, folder: Path) -> None:
    """Puts a folder on the stand-in, whatever is in it."""
    server.repos[repo_id] = {}
    server.commit(repo_id, contents(folder))


def test_configurations_on_the_hub_are_checked(cached_hub, folder, tmp_path):
    on_hub(cached_hub, "team/good", folder)
    assert load_model("team/good").config.model_type == "libra"
    for number, (change, message) in enumerate(
        [
            (edit("config.json", lambda c: c.update(use_3d_bridge=True)), "does not know: use_3d_bridge"),
            (write("generation_config.json", b"{nonsense"), "is not valid JSON"),
            (edit("config.json", lambda c: c["text_config"].update(num_hidden_layers=10**6)), "1000000 layers"),
            (edit("config.json", lambda c: c["text_config"].update(hidden_act="evil")), "KeyError: 'evil'"),
        ]
    ):
        changed = Path(shutil.copytree(folder, tmp_path / f"changed{number}"))
        change(changed)
        on_hub(cached_hub, f"team/changed{number}", changed)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_model(f"team/changed{number}")


def test_cards_on_the_hub_are_kept(cached_hub, folder, tmp_path):
    on_hub(cached_hub, "team/good", folder)
    assert card_of("team/good") == (folder / "README.md").read_text(encoding="utf-8")
    exported = export_folder("team/good", tmp_path / "exported")
    assert (exported / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    card = ModelCard(quantized_card("team/good", "good-int8", "int8"))
    assert (card.data.base_model, card.data.base_model_relation) == ("team/good", "quantized")
    assert card.data.license == "llama2"
    assert stored_dtype("team/good") == torch.float32


def test_what_is_refused_is_one_line_of_the_command(folder, capsys):
    (folder / ".env").write_text("x")
    (folder / "README.md").unlink()
    assert main(["push", "team/libra-toy", "--folder", str(folder), "--yes"]) == 2
    captured = capsys.readouterr()
    assert ".env" in captured.out  # the list of files comes first
    (line,) = captured.err.splitlines()
    assert ".env looks like" in line
    assert "README.md, the model card" in line


def test_files_too_large_for_the_hub(folder, monkeypatch):
    monkeypatch.setattr(push_module, "LARGEST_FILE", 400_000)
    assert "--max-shard-size" in "; ".join(plan_push("team/libra-toy", folder).problems)


def test_unfinished_folder(folder):
    partial = folder.rename(folder.with_name(".libra-toy.partial-17"))
    assert "interrupted" in "; ".join(plan_push("team/libra-toy", partial).problems)


@pytest.mark.parametrize("name", ["a/b/c", "team/-x", "team/x y"])
def test_names_the_hub_does_not_take(name):
    with pytest.raises(ValueError, match=r"[Rr]epo id"):
        plan_push(name, TINY)


def test_no_folder(tmp_path, capsys):
    assert main(["push", "team/absent", "--folder", str(tmp_path / "absent")]) == 2
    assert "no folder" in capsys.readouterr().err


FRESH = """
import sys
from tests.hub.fresh_process import NotInstalled
sys.meta_path.insert(0, NotInstalled())
import torch, transformers
repo, first, second = sys.argv[1:]
totals = []
for revision in (first, second, "main"):
    model = transformers.AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
    totals.append((model.lm_head.weight.sum().item(), processor.caption_prompt, type(model).__module__))
print(repr(totals))
"""


def test_pushed_twice_and_loaded_at_pinned_revisions(server, hub, folder, tmp_path):
    """`libra push` in a process of its own, and what another process without this package loads from there."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }
    run = {"env": environment, "capture_output": True, "text": True, "cwd": tmp_path}
    command = [sys.executable, "-m", "libra_cli.main", "push", "team/libra-toy", "--yes"]  # finds ./libra-toy
    pushed = subprocess.run(command, **run)
    assert pushed.returncode == 0, pushed.stderr
    changed = json.loads((folder / "processor_config.json").read_text()) | {"caption_prompt": "What is it?"}
    (folder / "processor_config.json").write_text(json.dumps(changed))
    edit_weights("", lambda weights: weights["lm_head.weight"].zero_() if "lm_head.weight" in weights else None)(folder)
    for file in sorted(folder.glob("model-*.safetensors")):
        weights = load_file(file)
        if "lm_head.weight" in weights:
            weights["lm_head.weight"].zero_()
            save_file(weights, file, metadata={"format": "pt"})
    push(plan_push("team/libra-toy", folder))
    first, second = hub.repos["team/libra-toy"]
    loaded = subprocess.run([sys.executable, "-c", FRESH, "team/libra-toy", first, second], **run)
    assert loaded.returncode == 0, loaded.stderr
    old, new, newest = eval(loaded.stdout.splitlines()[-1])
    assert old[0] != 0
    assert new[0] == newest[0] == 0
    assert [old[1], new[1], newest[1]] == [None, "What is it?", "What is it?"]
    assert all(entry[2].startswith("transformers_modules.") for entry in (old, new, newest))
