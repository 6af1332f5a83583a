"""Pretraining on captioned images of the web: from tars to weights, with bad samples, restarts and processes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments

from libra_cli.init import init_repo
from libra_cli.loading import load_libra
from libra_cli.main import main as libra
from tests.conftest import REPOSITORY
from tests.parts import TOKENIZER_FIELDS, make_clip, make_llm
from tests.training.caption_files import encode, write_shards, write_tar
from training import pretrain
from training.caption_stream import CaptionArguments
from training.data import DataArguments
from training.pretrain import PretrainArguments
from training.run import StageParser

CONFIG = REPOSITORY / "training" / "configs" / "pretrain_11b.yaml"
OPTIONS = {
    "max_steps": 6,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "text_to_image_fraction": 0.4,
    "shuffle_buffer": 4,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


@pytest.fixture(scope="module")
def start(golden, tmp_path_factory):
    """A fresh Libra."""
    folder = tmp_path_factory.mktemp("start")
    llm = make_llm(folder / "llm", "llama", golden)
    return init_repo(llm, make_clip(folder / "clip"), folder / "libra", **TOKENIZER_FIELDS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two tars of four samples, and one with a broken image, a missing caption and two good samples."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), shards=2, rows=4)
    members = {"a.png": b"broken", "a.txt": b"a red square", "b.png": encode("red")}
    for name in ("c", "d"):
        members |= {f"{name}.png": encode("red"), f"{name}.txt": f"a red square {name}".encode()}
    write_tar(folder / "bad.tar", members)
    return folder


def flags(start, shards, out, **options) -> list[str]:
    options = {"model": start, "dataset": shards, "output_dir": out, **OPTIONS, **options}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def assert_same_run(found, expected, steps):
    """The same weights bit for bit, the same losses in these steps."""
    weights = [load_libra(folder)[0].state_dict() for folder in (found, expected)]
    for name, value in weights[1].items():
        assert torch.equal(weights[0][name], value), name
    names = ("loss", "text_loss", "vision_loss", "skipped_no_caption", "skipped_image_cannot_be_decoded")
    logs = [
        [[log.get(name) for name in names] for log in history(folder) if "loss" in log and log["step"] in steps]
        for folder in (found, expected)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == len(steps)


def test_bad_samples_are_in_the_log(start, shards, tmp_path, capsys):
    pretrain.main(flags(start, shards, tmp_path, save_strategy="no", eval_strategy="steps", eval_steps=3,
                        eval_dataset=shards / "00001.tar", eval_samples=3))  # fmt: skip
    logs = [log for log in history(tmp_path) if "loss" in log]
    assert len(logs) == 6
    last = logs[-1]  # 12 samples: the second epoch has begun
    assert last["skipped_no_caption"] >= 1
    assert last["skipped_image_cannot_be_decoded"] >= 1
    out = capsys.readouterr().out
    assert "3 shards for 1 x 1 streams\n" in out
    assert "Trained on 12 samples and skipped" in out
    assert "frozen parameters are bit for bit as before training" in out
    assert "1 no caption" in out or "2 no caption" in out
    assert [log["step"] for log in history(tmp_path) if "eval_loss" in log] == [3, 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_changes_nothing(start, shards, tmp_path, workers):
    """Into the second epoch; with gradient accumulation, and workers that have read ahead."""
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    pretrain.main(flags(start, shards, tmp_path / "whole", **options))
    for step in (2, 4):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"from-{step}" / f"checkpoint-{step}")
        pretrain.main(flags(start, shards, tmp_path / f"from-{step}", **options))
        assert_same_run(tmp_path / f"from-{step}", tmp_path / "whole", range(step + 1, 7))


def test_a_restart_with_other_workers_is_refused(start, shards, tmp_path):
    pretrain.main(flags(start, shards, tmp_path, max_steps=2))
    with pytest.raises(ValueError, match="step 2 was made by 1 processes with 1 streams each, this run has 1 with 2"):
        pretrain.main(flags(start, shards, tmp_path, dataloader_num_workers=2))


def run_two_processes(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, "-m", "training.pretrain", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_two_processes_read_apart_and_restart_together(start, shards, tmp_path):
    out = run_two_processes(*flags(start, shards, tmp_path / "whole", max_steps=4))
    assert out.count("Trained on 16 samples and skipped") == 1
    assert out.count("frozen parameters are bit for bit as before training") == 1
    state = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    parts = state["stateful_callbacks"]["CaptionStream"]
    assert [part["samples"] for part in parts] == [8, 8]
    assert sum(sum(part["skipped"].values()) for part in parts) >= 2
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    run_two_processes(*flags(start, shards, tmp_path / "again", max_steps=4))
    assert_same_run(tmp_path / "again", tmp_path / "whole", (3, 4))


def test_a_dataset_of_bad_samples_stops_the_run(start, tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": b"broken", "a.txt": b"a dog", "b.txt": b"a dog"})
    with pytest.raises(ValueError, match=r"2 of 2 samples are bad.*1 image cannot be decoded, 1 no image"):
        pretrain.main(flags(start, tmp_path / "a.tar", tmp_path / "out"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dataset": "/no/tars/*.tar"}, "There are no captioned images at /no/tars"),
        ({"model": "/no/libra"}, "/no/libra"),
        ({"max_steps": -1}, "Set max_steps"),
        ({"eval_strategy": "epoch"}, "set eval_dataset or eval_split"),
        ({"global_batch_size": 8}, "set gradient_accumulation_steps to 4"),
        ({"global_batch_size": 7}, "set per_device_train_batch_size so that it divides"),
    ],
)  # fmt: skip
def test_mistakes_are_found_at_once(start, shards, tmp_path, capsys, wrong, message):
    assert libra(["train", "pretrain", *flags(start, shards, tmp_path / "out", **wrong)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_the_paper(tmp_path):
    """Table 4; 64 processes have the batch without accumulation."""
    parser = StageParser("pretrain", (PretrainArguments, DataArguments, CaptionArguments, TrainingArguments))
    cpu = ["--use_cpu", "True", "--bf16", "False", "--output_dir", str(tmp_path)]
    stage, data, captions, args = parser.parse_args_and_config(["--config", str(CONFIG), *cpu])
    assert (args.max_steps, args.warmup_steps, args.learning_rate) == (40_000, 2_000, 1e-4)
    assert (args.lr_scheduler_type, args.weight_decay, args.max_grad_norm) == ("cosine", 0.01, 1.0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.99, 1e-8)
    assert args.optim == "adamw_torch_fused"
    assert "\nbf16: true" in CONFIG.read_text()
    assert stage.global_batch_size == 1280
    assert 64 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 1280
    assert not captions.clean_captions
    assert data.dataset == "TARS/**/*.tar"


def test_the_recipe_names_what_is_missing(tmp_path, capsys):
    cpu = ["--use_cpu", "True", "--bf16", "False", "--output_dir", str(tmp_path / "out")]
    command = ["train", "pretrain", "--config", str(CONFIG), *cpu]
    assert libra(command) == 2
    assert "global_batch_size is 1280, but 20 samples a device, 1 processes" in capsys.readouterr().err
    assert libra([*command, "--gradient_accumulation_steps", "64"]) == 2
    assert "There are no captioned images at TARS/**/*.tar" in capsys.readouterr().err
