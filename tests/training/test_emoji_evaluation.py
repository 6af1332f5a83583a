"""libra-tiny's own evaluation: what is asked, how it is counted, and the whole of it on a toy."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from libra_cli import main as command
from training import evaluate_tiny
from training.emoji_drawing import Recogniser, draw_captions, reconstruct
from training.emoji_evaluation import (
    DRAWN,
    MAIN,
    PSNR,
    TASKS,
    TITLES,
    Case,
    ask,
    evaluate_emoji,
    exam_cases,
    exam_scenes,
    format_table,
    score,
)
from training.emoji_pictures import PICTURES
from training.world.concepts import Subject, load_concepts, training_subjects
from training.world.questions import Question
from training.world.scenes import World

SMALL = 150_000
"""Most bytes of a picture."""


@pytest.fixture
def scenes(icons):
    return exam_scenes(World(training_subjects(icons), "validation", 500))


@pytest.fixture(scope="module")
def toy(repo):
    """Model and processor of a toy, as users load them."""
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(repo, trust_remote_code=True)


def make_case(kind, answer, single=False):
    return Case(0, single, Question(kind, "?", answer))


def test_the_images_are_as_described(icons, scenes):
    assert Counter(scene.is_single for scene in scenes) == {True: 200, False: 300}
    assert Counter(scene.objects[0].subject for scene in scenes[:200]) == dict.fromkeys(range(8), 25)
    assert Counter(len(scene.objects) for scene in scenes[200:]) == {1: 100, 2: 100, 3: 100}
    again = exam_scenes(World(training_subjects(icons), "validation", 500))
    assert [scene.image.tobytes() for scene in again] == [scene.image.tobytes() for scene in scenes]
    for scene in scenes[200:]:
        cells = [item.cell for item in scene.objects]
        assert cells == sorted(set(cells))
        assert len({item.subject for item in scene.objects}) == len(cells)


def test_chance_is_what_the_best_blind_answer_scores(scenes):
    concepts = load_concepts(8)
    cases = exam_cases(scenes, concepts, TASKS)
    assert len(cases) == 200 * 8 + 300 * 9
    for name, task in TASKS.items():
        right = [c.question.answer for c in cases if (c.question.kind, c.single) == (task.kind, task.single)]
        blind = {
            answer: score(task, cases, [answer] * len(cases)).value for answer in set(right) - {"nothing"} | {"yes"}
        }
        if name == "cell_any":
            blind["nothing"] = score(task, cases, ["nothing"] * len(cases)).value
        if task.kind == "choice_named":
            blind["first option"] = score(task, cases, [_first_option(case.question) for case in cases]).value
        best = max(blind.values())
        spread = 4 * np.sqrt(0.25 / len(right))  # the answers are drawn at random
        assert abs(best - task.chance(len(concepts))) < spread, name


def _first_option(question: Question) -> str:
    """The name and the letter of option A, if there are options."""
    lines = question.question.split("\n")
    return f"{lines[1].removeprefix('A. ')}: A" if len(lines) > 2 else ""


def test_questions_of_unwanted_kinds_are_not_asked(scenes):
    cases = exam_cases(scenes, load_concepts(8), {"cell": TASKS["cell"], "choice": TASKS["choice"]})
    assert Counter((case.question.kind, case.single) for case in cases) == {("cell", False): 300, ("choice", True): 200}
    assert all(case.single == scenes[case.image].is_single for case in cases)


def test_captions_are_asked_for_without_their_prompt_too(scenes):
    tasks = {name: TASKS[name] for name in ("caption", "describe", "caption_single", "describe_single")}
    cases = exam_cases(scenes, load_concepts(8), tasks)
    asked = {kind: [case for case in cases if case.question.kind == kind] for kind in ("caption", "describe")}
    assert {case.question.question for case in asked["describe"]} == {"Describe the image."}
    assert [case.image for case in asked["describe"]] == [case.image for case in asked["caption"]] == [*range(500)]
    right = [[case.question.answer for case in of_kind] for of_kind in asked.values()]
    assert right[0] == right[1] == [scene.caption for scene in scenes]


def test_scores_of_answers_by_hand():
    cases = [
        make_case("cell", "horse"), make_case("cell", "nothing"), make_case("cell", "key"), make_case("count", "2"),
        make_case("count", "1", single=True), make_case("exists", "yes"), make_case("exists", "yes"),
        make_case("exists", "no"), make_case("exists", "no"),
    ]  # fmt: skip
    answers = ["horse", "nothing", "a key", "2", "3", "yes", "Yes", "yes", "no"]
    found = {name: score(TASKS[name], cases, answers) for name in ("cell", "cell_any", "count", "count_single")}
    assert {name: (of.value, of.count) for name, of in found.items()} == {
        "cell": (0.5, 2), "cell_any": (2 / 3, 3), "count": (1.0, 1), "count_single": (0.0, 1),
    }  # fmt: skip
    assert score(TASKS["exists"], cases, answers).value == 0.5
    assert score(TASKS["exists_f1"], cases, answers).value == pytest.approx(2 / 4)  # TP 1, FP 1, FN 1
    with pytest.raises(ValueError, match="count=0"):
        score(TASKS["place"], cases, answers)


def test_answers_are_those_of_generate(scenes, toy):
    model, processor = toy
    shown = [*scenes[:3], *scenes[200:204]]
    cases = exam_cases(shown, load_concepts(8), TASKS)
    answers = ask(model, processor, shown, cases, batch_size=2)
    assert len(answers) == 3 * 8 + 4 * 9
    assert len(set(answers)) > 3
    for case, answer in list(zip(cases, answers))[::4]:
        parts = [{"type": "image", "image": shown[case.image].image}, {"type": "text", "text": case.question.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        kind = case.question.kind
        right = [c.question.answer for c in cases if c.question.kind == kind]
        longest = max(len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in right)
        ids = model.generate(**inputs, max_new_tokens=longest + 2, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == text.strip(), case


def test_drawings_are_samples_of_the_model(toy):
    model, processor = toy
    captions = ["horse", "a key to the left of a horse"]
    drawn = draw_captions(model, processor, captions, temperature=1.0)
    assert [image.tobytes() for image in draw_captions(model, processor, captions, 1.0)] == [i.tobytes() for i in drawn]
    other = draw_captions(model, processor, captions, 1.0, seed=1)
    assert other[0].tobytes() != drawn[0].tobytes()
    cold = draw_captions(model, processor, captions, temperature=1e-6)  # so cold that it is greedy
    inputs = processor(text=captions, generation_mode="image", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=processor.num_image_tokens - 1, do_sample=False)
    greedy = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert [image.tobytes() for image in cold] == [image.tobytes() for image in greedy]
    with pytest.raises(ValueError, match="temperature must be at least 1e-06, found 0"):
        draw_captions(model, processor, captions, 0)


def test_psnr_of_reconstructions(toy, scenes):
    _, processor = toy
    grey = Image.new("RGB", (96, 96), (128, 128, 128))
    images, decibels, plain = reconstruct(processor, [scenes[0].image, grey])
    size = processor.image_tokenizer.config.resolution
    assert [image.size for image in images] == [(size, size)] * 2
    assert plain[1] > 90  # an image of one colour is its mean colour
    target = np.asarray(grey.resize((size, size)), dtype=float)
    error = ((np.asarray(images[1], dtype=float) - target) ** 2).mean() / 255**2
    assert decibels[1] == pytest.approx(-10 * np.log10(error), abs=0.05)


def test_the_teacher_recognises_what_it_was_shown(icons):
    subjects = training_subjects(icons)
    recognise = Recogniser.of(subjects)
    torch.testing.assert_close(np.linalg.norm(recognise.means, axis=1), np.ones(8, dtype=np.float32))
    scenes = exam_scenes(World(subjects, "validation", 40))[:16]
    named = recognise([scene.image for scene in scenes])
    assert sum(name == scene.objects[0].subject for name, scene in zip(named, scenes)) >= 14
    order = [subjects[3], subjects[0], subjects[5]]
    assert Recogniser.of(order)([scenes[3].image]) == [0]


def test_the_command_from_end_to_end(repo, icons, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    options = ["--model", str(repo), "--icons", str(icons), "--images", "15", "--output", str(out)]
    assert command.main(["evaluate", "--tasks", "emoji", *options]) == 0
    report = json.loads(out.read_text())
    results = report["results"]
    assert list(results) == list(TITLES)
    assert set(MAIN) <= set(results)
    printed = capsys.readouterr().out
    assert format_table(results) in printed
    for name, result in results.items():
        assert f"| {result['title']} | " in printed
        for source in ("train_vendors", "unseen_vendor"):
            found = result[source]
            if name == DRAWN and source == "unseen_vendor":
                assert found is None
                continue
            assert found["count"] > 0
            assert found["low"] <= found["value"] <= found["high"]
        assert result["chance"] > 0
    assert results["label"]["chance"] == 1 / 8
    assert results[DRAWN]["train_vendors"]["count"] == 8


def test_some_results_only(repo, icons):
    report = evaluate_emoji(repo, icons, 10, only=[PSNR, "count"])
    assert list(report["results"]) == ["count", PSNR]
    assert report["results"]["count"]["train_vendors"]["count"] == 6


def test_wrong_wishes_are_named_at_once(tmp_path, icons, capsys):
    with pytest.raises(ValueError, match="no result colour; choose from label, cell"):
        evaluate_emoji(tmp_path, icons, only=["label", "colour"])
    with pytest.raises(ValueError, match="num_images is 9, expected at least 10"):
        evaluate_emoji(tmp_path, icons, num_images=9)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere to write a.json into"):
        evaluate_tiny.evaluate_and_report(tmp_path, icons, output=tmp_path / "nowhere" / "a.json")
    for flags in (["--write-card"], ["--write-card", "--only", "label"]):
        with pytest.raises(SystemExit):
            evaluate_tiny.main(["--model", str(tmp_path), "--icons", str(icons), *flags])
    assert "loss_curves.png, which is not there" in capsys.readouterr().err


def test_subjects_with_several_drawings_have_one_mean(icons):
    subjects = training_subjects(icons)
    merged = Subject("both", subjects[0].drawings + subjects[1].drawings, ("a",) * 4)
    means = Recogniser.of([merged, *subjects[2:5]]).means
    assert means.shape == (4, 1280)


def test_the_card_from_the_command(repo, icons, tmp_path, monkeypatch):
    folder, run = tmp_path / "repo", tmp_path / "sft"
    shutil.copytree(repo, folder)
    for shard in folder.glob("model-*.safetensors"):
        shutil.copyfile(shard, folder / "model.safetensors")
    run.mkdir()
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    arguments = ["--model", folder, "--icons", icons, "--images", 10, "--write-card", "--runs", run]
    evaluate_tiny.main([str(argument) for argument in arguments])
    card = ModelCard.load(folder / "README.md")
    assert {result.dataset_type for result in card.data.eval_results} == {"fluent-emoji-flat", "emoji-train-vendors"}
    for name in PICTURES:
        assert f"]({name})" in card.text
        assert 1000 < (folder / name).stat().st_size < SMALL
