"""Libra in lmms-eval itself, on a tiny task of real images. Needs lmms-eval (`make install` puts it there)."""

import json
import os
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value

from libra_cli.main import main

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install --no-deps lmms-eval==0.7.3")

from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import ImageFile

from training.benchmarks import scoring
from training.benchmarks.lmms_model import AnswerFile, LibraLmms, describe_weights
from training.benchmarks.lmms_plugin import manifest
from training.benchmarks.run import TASKS, format_table, our_tasks, read_numbers, run_benchmarks

ROOT = Path(__file__).parents[2]
TINY = ROOT / "hub_configs" / "libra-tiny"
ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval turns it on for the whole process, the other tests included
DRAWINGS = [ROOT / "samples" / f"{name}.png" for name in ("airplane", "horse", "strawberry")]
PROMPT = "Answer the question using a single word or phrase."


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with the tasks toy_vqa, as our own VQA tasks are written, and toy_pope; six samples each."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "image": [str(path) for path in DRAWINGS * 2],
        "question": ["What is in the image?"] * 3 + ["How many objects are there?", "Is there a horse?", "What is it?"],
        "answers": [[name] * 10 for name in ("airplane", "horse", "strawberry", "1", "no", "strawberry")],
        "answer": ["no", "yes", "no", "no", "yes", "no"],
        "category": ["random", "popular"] * 3,
    }
    features = Features(
        {"image": Image(), "question": Value("string"), "answers": List(Value("string")), "answer": Value("string"),
         "category": Value("string")}
    )  # fmt: skip
    Dataset.from_dict(rows, features=features).to_parquet(folder / "toy.parquet")
    data = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(folder / "toy.parquet")}}}
    for name, template in (("toy_vqa", "_vqa"), ("toy_pope", "pope.yaml")):
        included = {"include": str(TASKS / template), "task": name, **data, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(included), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def libra() -> LibraLmms:
    return LibraLmms(TINY, batch_size=4, device="cpu")


class Request:
    """What a request of lmms-eval has that the model reads."""

    def __init__(self, text: str, number: int = 0, **settings) -> None:
        def messages(doc):
            return [{"role": "user", "content": [{"type": "image", "url": doc}, {"type": "text", "text": text}]}]

        self.args = (text, messages, settings, number, "toy", "test")


@pytest.fixture
def shown(libra):
    """The drawings, as samples of a task called toy."""
    from PIL import Image as Pillow

    libra.task_dict = {"toy": {"test": [Pillow.open(path).convert("RGB") for path in DRAWINGS]}}
    return libra


def test_entry_point_gives_the_model():
    (found,) = [point for point in entry_points(group="lmms_eval.models") if point.name == "libra"]
    assert found.load()() == manifest()
    from lmms_eval.models import get_model

    assert get_model("libra") is LibraLmms
    made = LibraLmms.create_from_arg_string(f"pretrained={TINY}", {"batch_size": "2", "device": "cpu"})
    assert (made.batch_size, made.model.device.type) == (2, "cpu")


def test_every_task_of_ours_is_known_and_complete():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, model_name="libra")
    assert sorted(manager.all_tasks) == our_tasks()
    assert len(our_tasks()) == 15
    for file in TASKS.glob("*.yaml"):
        task = load_yaml_config(str(file), mode="simple")
        assert task["task"] == f"libra_{file.stem}"
        assert {"dataset_path", "test_split", "output_type", "doc_to_text", "process_results", "metric_list"} <= set(
            task
        )
        assert task["generation_kwargs"]["do_sample"] is False


def test_functions_the_tasks_name_are_there():
    named = [
        word
        for file in TASKS.iterdir()
        for word in file.read_text(encoding="utf-8").split()
        if word.startswith("training.benchmarks.scoring.")
    ]
    assert len(named) > 20
    assert all(callable(getattr(scoring, word.rpartition(".")[2])) for word in named)


def test_run_evaluates_resumes_and_writes(tasks, tmp_path, capsys, monkeypatch):
    report = run_benchmarks(TINY, ["toy_vqa", "toy_pope"], tmp_path, batch_size=4, include=tasks)
    answers = dict(AnswerFile(tmp_path / "answers.jsonl", describe_weights(TINY)).read())
    assert len(answers) == 12
    airplane = next(
        text for key, text in answers.items() if json.loads(key)[0] == "toy_vqa" and json.loads(key)[2] == 0
    )
    assert airplane == "airplane"
    assert report["results"]["toy_vqa"]["vqa_accuracy"] >= 100 / 6
    assert set(report["results"]["toy_pope"]) == {"pope_f1", "pope_accuracy", "pope_yes_ratio"}
    assert report["samples"] == {"toy_vqa": 6, "toy_pope": 6}
    assert json.loads((tmp_path / "results.json").read_text()) == report
    assert "| toy_vqa | vqa_accuracy | 6 |" in (tmp_path / "results.md").read_text()

    # killed while it wrote: half a line is dropped, and only what is missing is asked again
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:8]) + lines[8][:20])
    asked = []
    answer = LibraLmms._answer
    monkeypatch.setattr(LibraLmms, "_answer", lambda self, batch: asked.extend(batch) or answer(self, batch))
    again = run_benchmarks(TINY, ["toy_vqa", "toy_pope"], tmp_path, batch_size=4, include=tasks)
    assert len(asked) == 5
    assert again["results"] == report["results"]


def test_batches_answer_as_single_requests_do(shown):
    requests = [Request(f"{text}\n{PROMPT}", number, max_new_tokens=10) for number, text in
                enumerate(["What is in the image?", "How many objects are there?", "Is there a horse in the image?"])]  # fmt: skip
    together = shown.generate_until(requests)
    assert together == [shown.generate_until([request])[0] for request in requests]
    assert together[0] == "airplane"


def test_answers_end_where_the_task_says(shown):
    whole, cut = shown.generate_until(
        [Request(f"What is in the image?\n{PROMPT}", max_new_tokens=10, until=until) for until in ([], ["plane"])]
    )
    assert (whole, cut) == ("airplane", "air")


def test_sampling_settings_of_a_task_do_not_matter(shown):
    torch.manual_seed(0)
    texts = {
        shown.generate_until([Request(f"What is in the image?\n{PROMPT}", max_new_tokens=10, **settings)])[0]
        for settings in ({}, {"temperature": 5.0, "do_sample": True}, {"num_beams": 3})
    }
    assert texts == {"airplane"}


def test_half_a_pair_is_left_out_of_the_score(capsys):
    """`--limit` may cut between the two questions of an image."""
    doc = {"category": "color", "answer": "Yes"}
    rows = [scoring.score_mme(doc | {"question_id": image}, ["yes"])["mme_perception"] for image in "aab"]
    assert scoring.mme_perception(rows) == 200
    mmvp = [{"right": True, "pair": 0}, {"right": False, "pair": 0}, {"right": True, "pair": 1}]
    assert scoring.mmvp_pairs(mmvp) == 0
    assert capsys.readouterr().out.count("1 questions are left out") == 2


def test_what_libra_cannot_do_is_said(libra):
    with pytest.raises(NotImplementedError, match="compares likelihoods"):
        libra.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        libra.generate_until_multi_round([])


def test_answers_of_another_model_are_refused(tmp_path):
    AnswerFile(tmp_path / "answers.jsonl", "one")
    with pytest.raises(ValueError, match="answers of 'one', not of 'another'"):
        AnswerFile(tmp_path / "answers.jsonl", "another")


def test_answers_of_the_same_folder_before_more_training_are_refused(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.touch()
    AnswerFile(tmp_path / "answers.jsonl", describe_weights(tmp_path))
    AnswerFile(tmp_path / "answers.jsonl", describe_weights(tmp_path))
    os.utime(weights, (0, 0))
    with pytest.raises(ValueError, match="weights of"):
        AnswerFile(tmp_path / "answers.jsonl", describe_weights(tmp_path))


def refuse(*args, **kwargs):
    raise AssertionError("the model must not be loaded")


def test_wrong_tasks_are_named_before_the_model_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("training.benchmarks.lmms_model.load_libra", refuse)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["evaluate", "--tasks", "libra_gqa", "libra_nonsense", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "no task libra_nonsense" in error
    assert "libra_pope" in error
    assert main(["evaluate", "--tasks", "libra_mmvet", "--output", str(tmp_path / "out")]) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_emoji_goes_alone(capsys):
    assert main(["evaluate", "--tasks", "emoji", "libra_gqa"]) == 2
    assert "by itself" in capsys.readouterr().err


def test_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("training.benchmarks.run.find_spec", lambda name: None)
    assert main(["evaluate", "--tasks", "libra_gqa"]) == 2
    assert "libra-vlm[benchmarks]" in capsys.readouterr().err


def test_numbers_stand_beside_others(tmp_path):
    report = {
        "model": "DIR/ours",
        "samples": {"libra_gqa": 3},
        "results": {"libra_gqa": {"exact_match": 50.0, "x": 1.0}},
    }
    (tmp_path / "paper.json").write_text('{"libra_gqa": {"exact_match": 61}}')
    table = format_table(report, read_numbers(tmp_path / "paper.json"), "paper").splitlines()
    assert table[0] == "| task | metric | samples | ours | paper |"
    assert table[2:] == ["| libra_gqa | exact_match | 3 | 50 | 61 |", "| libra_gqa | x | 3 | 1 | - |"]
    (tmp_path / "paper.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be JSON"):
        read_numbers(tmp_path / "paper.json")


def test_scores_of_the_tasks_by_hand():
    mmbench = [
        scoring.score_mmbench({"A": "cat", "B": "dog", "C": "nan", "answer": right, "index": index}, [given])
        for index, right, given in ((7, "A", "A."), (1_000_007, "B", "B"), (8, "A", "A"), (1_000_008, "B", "A"))
    ]
    assert [row["accuracy"] for row in mmbench] == [100, 100, 100, 0]
    assert scoring.mmbench_circular([row["mmbench_circular"] for row in mmbench]) == 50
    mmvp = [
        scoring.score_mmvp({"Index": index, "Correct Answer": right, "Options": "(a) Open (b) Closed"}, [given])
        for index, right, given in ((1, "(a)", "A"), (2, "(b)", "Closed"), (3, "(a)", "B"), (4, "(b)", "B"))
    ]
    assert scoring.mmvp_pairs([row["mmvp_pairs"] for row in mmvp]) == 50
    assert scoring.score_vqa({"answers": [{"answer": "2"}] * 9 + [{"answer": "3"}]}, ["two"]) == {"vqa_accuracy": 100}
    assert scoring.score_scienceqa({"choices": ["a fox", "a hen"], "answer": 1}, ["a hen"]) == {"accuracy": 100}
    seed = {"choice_a": "x", "choice_b": "y", "choice_c": "z", "choice_d": "w", "answer": "D"}
    assert scoring.score_seed(seed, ["D. w"]) == {"accuracy": 100}
    mme = {"answer": "Yes", "category": "color", "question_id": "1.png"}
    (found,) = scoring.score_mme(mme, ["yes"]).items()
    assert found[0] == "mme_perception"
    assert scoring.mme_perception([found[1]] * 2) == 200
    with pytest.raises(RuntimeError, match="1 of 2"):
        scoring.mmvet_score([{"score": 1.0, "eval_model": "judge"}, {"score": 0.0, "eval_model": ""}])


SHORT, LETTER = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
OPTIONS = {"A": "cat", "B": "dog", "C": "nan", "D": "nan", "answer": "A", "index": 1, "category": "c", "L2-category": "l",
           "hint": "nan", "source": "s", "split": "dev"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "doc", "text"),
    [
        ("vqav2", {"question": "What is it?"}, f"What is it?\n{SHORT}"),
        ("okvqa", {"question": "What is it?"}, f"What is it?\n{SHORT}"),
        ("vizwiz", {"question": "What is it?"}, f"What is it?\n{SHORT}"),
        ("gqa", {"question": "What is it?"}, f"What is it?\n{SHORT}"),
        ("pope", {"question": "Is it?"}, f"Is it?\n{SHORT}"),
        ("mme", {"question": "Is it red? Please answer yes or no."}, f"Is it red?\n{SHORT}"),
        ("scienceqa_img", {"hint": "H.", "question": "Which?", "choices": ["a", "b"]}, f"Context: H.\nWhich?\nA. a\nB. b\n{LETTER}"),
        ("seed", {"question": "Which?", **{f"choice_{c}": c for c in "abcd"}}, f"Which?\nA. a\nB. b\nC. c\nD. d\n{LETTER}"),
        ("mmbench", {"question": "Which?", **OPTIONS}, f"Which?\nA. cat\nB. dog\n{LETTER}"),
        ("mmbench_cn", {"question": "哪个？", **OPTIONS}, "哪个？\nA. cat\nB. dog\n请直接回答。"),
        ("mmvp", {"Question": "Which?", "Options": "(a) Open (b) Closed"}, f"Which?\nA. Open\nB. Closed\n{LETTER}"),
        ("nocaps", {}, "Provide a one-sentence caption for the provided image."),
        ("flickr30k", {}, "Provide a one-sentence caption for the provided image."),
    ],
)  # fmt: skip
def test_prompts_are_those_of_the_paper(name, doc, text):
    task = load_yaml_config(str(TASKS / f"{name}.yaml"), mode="full")
    settings = task["lmms_eval_specific_kwargs"]
    asked = task["doc_to_text"](doc) if settings is None else task["doc_to_text"](doc, settings["default"])
    assert asked == text
