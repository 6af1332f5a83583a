import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import processing
from processing.processing_libra import LibraProcessor

AUTO_MAP = {"AutoProcessor": "processing_libra.LibraProcessor"}
REVISION = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys, torch
from transformers import AutoProcessor
image, output, again, *names = sys.argv[1:]
processors = [AutoProcessor.from_pretrained(name, trust_remote_code=True) for name in names]
processors[0].save_pretrained(again)
processors.append(AutoProcessor.from_pretrained(again, trust_remote_code=True))
torch.save([dict(processor(images=image, return_tensors="pt")) for processor in processors], output)
assert "processing" not in sys.modules  # all of it is remote code
"""


def assert_same(loaded, processor, release):
    text, images = release.prompts_with_one_placeholder, release.images
    batch, expected = (p(text=text, images=images, return_tensors="pt") for p in (loaded, processor))
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["image_features"], expected["image_features"])
    assert loaded.chat_template == processor.chat_template


def test_save_and_load(processor, release, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "image_tokenizer" / "model.safetensors").is_file()
    assert (tmp_path / "chat_template.jinja").read_text() == processor.chat_template
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["text_vocab_size"] == 360
    assert "image_tokenizer" not in saved
    loaded = LibraProcessor.from_pretrained(tmp_path)
    assert_same(loaded, processor, release)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(LibraProcessor.from_pretrained(tmp_path / "again"), processor, release)


def test_load_from_a_subfolder(processor, release, tmp_path):
    processor.save_pretrained(tmp_path / "inside")
    assert_same(LibraProcessor.from_pretrained(tmp_path, subfolder="inside"), processor, release)


def test_own_chat_template_survives(processor, tmp_path):
    processor.chat_template = "{{ messages[0]['content'] }}"
    processor.save_pretrained(tmp_path)
    assert LibraProcessor.from_pretrained(tmp_path).chat_template == processor.chat_template


def test_representation_does_not_copy_the_image_tokenizer(processor):
    assert "text_vocab_size" in repr(processor)
    assert "image_tokenizer" not in processor.to_dict()
    assert processor.image_tokenizer is not None


@pytest.fixture
def repository(processor, tmp_path):
    """The processor as a Hub repository with remote code."""
    folder = tmp_path / "repository"
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": AUTO_MAP}))
    (folder / "config.json").write_text(json.dumps({"model_type": "libra"}))
    for file in Path(processing.__file__).parent.glob("*.py"):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)
    return folder


def test_remote_code_in_a_fresh_process(processor, repository, release, tmp_path):
    """AutoProcessor loads a folder, a repository in the Hub cache, and a folder that was saved after loading."""
    cache = tmp_path / "home" / "hub" / "models--someone--libra"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(REVISION)
    shutil.copytree(repository, cache / "snapshots" / REVISION)
    (tmp_path / "load.py").write_text(LOAD)
    output, again = tmp_path / "batches.pt", tmp_path / "again"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    names = [release.images[0], str(output), str(again), str(repository), "someone/libra"]
    command = [sys.executable, "-P", str(tmp_path / "load.py"), *names]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected = processor(images=release.images[0], return_tensors="pt")
    batches = torch.load(output)
    assert len(batches) == 3
    for batch in batches:
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        torch.testing.assert_close(batch["image_features"], expected["image_features"])
