"""A run that is killed at any moment and goes on gives the losses and the weights of one that was not, bit for bit."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME

from libra_cli.init import init_repo
from tests.parts import TOKENIZER_FIELDS, make_clip, make_llm
from tests.training.caption_files import COLOURS, encode, write_shards
from training import pretrain, sft
from training.checkpoints import UNFINISHED, last_checkpoint

STAGES = {"pretrain": pretrain.main, "sft": sft.main}
COMMON = {
    "max_steps": 6,
    "save_steps": 2,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def processes():
    """Real processes, made by one that has the imports done: each would take ten seconds for them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.pretrain", "training.sft"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # two run side by side
        yield context


@pytest.fixture(scope="module")
def start(golden, tmp_path_factory):
    """A fresh Libra."""
    folder = tmp_path_factory.mktemp("start")
    llm = make_llm(folder / "llm", "llama", golden)
    return init_repo(llm, make_clip(folder / "clip"), folder / "libra", **TOKENIZER_FIELDS)


def tars(folder, icons):
    """Of 8 samples: 6 steps of two go into the second epoch. Read ahead by a worker."""
    options = {"shuffle_buffer": 4, "text_to_image_fraction": 0.4, "dataloader_num_workers": 1}
    options["dataloader_multiprocessing_context"] = "fork"  # as everywhere but in processes of a forkserver
    return {"dataset": write_shards(folder, shards=2, rows=4), **options}


def parquet(folder, icons):
    rows = {"image": [{"bytes": encode(c), "path": None} for c in COLOURS], "text": [f"a {c} square" for c in COLOURS]}
    table = Dataset.from_dict(rows, features=Features({"image": Image(), "text": Value("string")}))
    table.to_parquet(folder / "a.parquet")
    return {"dataset": folder / "*.parquet", "shuffle_buffer": 4, "gradient_accumulation_steps": 2}


def world(folder, icons):
    return {"dataset": "world", "icons": icons, "train_samples": 10, "text_to_image_fraction": 0.4}


def talks(folder, icons):
    samples = []
    for number, colour in enumerate(COLOURS[:5]):
        (folder / f"{colour}.png").write_bytes(encode(colour))
        turns = [("human", "<image>\nWhat colour?" if number else "Which?"), ("gpt", colour)]
        sample = {"id": colour, "conversations": [{"from": who, "value": text} for who, text in turns]}
        samples.append(sample | ({"image": f"{colour}.png"} if number else {}))
    (folder / "talks.json").write_text(json.dumps(samples))
    return {"dataset": folder / "talks.json"}


def while_saving(step, name):
    """The moment before a file of a step's checkpoint is opened for the first time."""
    return "open", f"checkpoint-{step}/{name}", 0.0


def after(step, seconds):
    """Some time into what follows the end of a checkpoint: its mark goes last."""
    return "os.remove", f"checkpoint-{step}/{UNFINISHED}", seconds


def run_until(moment, stage, out, flags):
    """Runs a stage and kills it from within, so that no moment is missed on a fast or a busy machine."""
    event, name, seconds = moment
    path = str(out / name)

    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(what, details):
        if what == event and str(details[0]) == path:
            threading.Thread(target=kill).start() if seconds else kill()

    sys.addaudithook(hook)
    STAGES[stage](flags)


@pytest.mark.parametrize(
    ("stage", "make_data", "moments"),
    [
        ("pretrain", tars, [while_saving(2, "config.json"), after(2, 0.001), while_saving(4, TRAINER_STATE_NAME)]),
        ("pretrain", parquet, [after(2, 0.02)]),
        ("pretrain", world, [after(6, 0.0)]),
        ("sft", talks, [after(2, 0.01), while_saving(4, UNFINISHED)]),
    ],
    ids=["pretrain-tars", "pretrain-parquet", "pretrain-world", "sft"],
)
def test_a_killed_run_goes_on(processes, start, icons, tmp_path, stage, make_data, moments):
    (tmp_path / "data").mkdir()
    options = COMMON | {"model": start} | make_data(tmp_path / "data", icons)

    def start_run(out, moment=None):
        flags = [part for name, value in (options | {"output_dir": out}).items() for part in (f"--{name}", str(value))]
        target, args = (run_until, (moment, stage, out, flags)) if moment else (STAGES[stage], (flags,))
        process = processes.Process(target=target, args=args)
        process.start()
        return process

    def end_of(process):
        process.join(900)
        return process.exitcode

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start_run(whole)
    for moment in moments:
        assert end_of(start_run(killed, moment)) == -signal.SIGKILL
    assert end_of(start_run(killed)) == 0
    assert end_of(uninterrupted) == 0

    names = ("step", "loss", "text_loss", "vision_loss", "grad_norm", "learning_rate")
    logs = [json.loads((out / "trainer_state.json").read_text())["log_history"] for out in (whole, killed)]
    logs = [[tuple(log.get(name) for name in names) for log in log if "loss" in log] for log in logs]
    assert len(logs[0]) == COMMON["max_steps"]
    assert logs[1] == logs[0]
    weights = [load_file(out / "model.safetensors") for out in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    # Nothing half-written is left, and no older checkpoints than asked for.
    assert sorted(folder.name for folder in killed.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not [*killed.rglob(UNFINISHED)]


def make_checkpoint(folder, *files):
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()


def test_what_is_half_written_is_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "nothing") is None
    make_checkpoint(tmp_path / "checkpoint-100", "model.safetensors")
    assert last_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path / "checkpoint-9", "model.safetensors", "trainer_state.json")
    make_checkpoint(tmp_path / "checkpoint-10", "model.safetensors", "trainer_state.json")
    make_checkpoint(tmp_path / "checkpoint-101", "model.safetensors", "trainer_state.json", UNFINISHED)
    make_checkpoint(tmp_path / "checkpoint-later", "trainer_state.json")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
