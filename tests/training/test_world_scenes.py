"""Scenes, questions and text of the world."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from training.world.augment import Augmentation
from training.world.concepts import Subject, load_concepts, training_subjects
from training.world.corpus import END, KINDS_OF_THINGS, SYSTEM_MESSAGE, TextWorld, chat, notes, prompts_with_answers
from training.world.options import ask_for_letters
from training.world.questions import (
    GRID_KINDS,
    PROMPT_CHOICE,
    PROMPT_CHOICE_NAMED,
    PROMPT_SHORT,
    PROMPT_SHORT_ZH,
    SINGLE_KINDS,
    Question,
    scene_questions,
)
from training.world.scenes import CELLS, Layout, SceneObject, World, describe, evaluation_images


@pytest.fixture
def world(icons) -> World:
    return World(training_subjects(icons), "train", 300, seed=3)


def test_a_scene_is_a_function_of_seed_split_and_index(icons, world):
    again = World(training_subjects(icons), "train", 300, seed=3)
    for index in (0, 7, 299):
        assert world[index].objects == again[index].objects
        assert world[index].image.tobytes() == again[index].image.tobytes()
    other_seed = World(world.subjects, "train", 300, seed=4)
    other_split = World(world.subjects, "validation", 300, seed=3)
    assert any(world[i].image.tobytes() != other_seed[i].image.tobytes() for i in range(3))
    assert any(world[i].image.tobytes() != other_split[i].image.tobytes() for i in range(3))


def test_scenes_are_as_described(world):
    counts = Counter()
    for index in range(len(world)):
        scene = world[index]
        assert (scene.image.size, scene.image.mode) == ((96, 96), "RGB")
        subjects = [item.subject for item in scene.objects]
        assert len(set(subjects)) == len(subjects)
        assert scene.caption == describe([world.subjects[s].label for s in subjects], [o.cell for o in scene.objects])
        cells = [item.cell for item in scene.objects]
        assert cells == [None] if scene.is_single else cells == sorted(set(cells))
        counts["single" if scene.is_single else len(cells)] += 1
    assert 110 < counts["single"] < 190
    assert all(counts[number] > 25 for number in (1, 2, 3))


def test_objects_fill_their_cells():
    square = np.full((96, 96, 4), 255, dtype=np.uint8)
    square[..., :3] = 0
    world = World([Subject(str(i), (square,), ("toy",)) for i in range(4)], "train", 60, pastel_fraction=0.0)
    for index in range(len(world)):
        scene = world[index]
        black = np.asarray(scene.image)[..., 0] < 128
        for item in scene.objects:
            space = 96 if item.cell is None else 48
            row, column = divmod(item.cell or 0, 2)
            area = black[row * space : (row + 1) * space, column * space : (column + 1) * space].sum()
            assert 0.74**2 <= area / space**2 <= 0.96**2
        assert black.sum() <= sum(((96 if o.cell is None else 48) * 0.96) ** 2 for o in scene.objects)


def test_share_of_singles_can_change_over_time(icons):
    world = World(training_subjects(icons), "train", 200, single_fraction=(0.0, 1.0))
    singles = [world[index].is_single for index in range(200)]
    assert sum(singles[:50]) < 15
    assert sum(singles[150:]) > 35


def test_weights_choose_the_subjects(icons):
    weights = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    world = World(training_subjects(icons), "train", 30, weights=weights)
    assert {item.subject for index in range(30) for item in world[index].objects} == {0, 1, 2}


def test_wrong_settings_are_refused(icons):
    subjects = training_subjects(icons)
    with pytest.raises(ValueError, match="split is 'dev'"):
        World(subjects, "dev", 1)
    with pytest.raises(ValueError, match="max_objects is 5"):
        World(subjects, "train", 1, max_objects=5)
    with pytest.raises(ValueError, match="got 2"):
        World(subjects[:2], "train", 1)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\)"):
        World(subjects, "train", 1, weights=np.ones(3))
    with pytest.raises(IndexError, match="scene 1 of a world of 1"):
        World(subjects, "train", 1)[1]


@pytest.mark.parametrize(
    ("cells", "caption"),
    [
        ([None], "horse"),
        ([2], "horse"),
        ([0, 1], "horse to the left of key"),
        ([2, 3], "horse to the left of key"),
        ([1, 3], "horse above key"),
        ([0, 3], "horse and key"),
        ([1, 2], "horse and key"),
        ([0, 1, 3], "horse, key and bear"),
    ],
)
def test_captions(cells, caption):
    assert describe(["horse", "key", "bear"][: len(cells)], cells) == caption


def test_evaluation_images_show_each_subject_in_turn(icons):
    world = World(training_subjects(icons), "validation", 1)
    scenes = evaluation_images(world, 20)
    assert [scene.objects[0].subject for scene in scenes] == [i % 8 for i in range(20)]
    assert all(scene.is_single for scene in scenes)
    assert scenes[0].image.tobytes() != scenes[8].image.tobytes()


def test_augmentation_keeps_shape_and_is_off_by_default(world):
    icon = Image.fromarray(world.subjects[0].drawings[0])
    rng = np.random.default_rng(0)
    assert Augmentation()(icon, rng).tobytes() == icon.tobytes()
    changed = Augmentation(12, 0.1, 0.2, 1.0, 0.5, 1.0)(icon, rng)
    assert (changed.size, changed.mode) == (icon.size, "RGBA")
    assert changed.tobytes() != icon.tobytes()
    gray = np.asarray(Augmentation(gray=1.0)(icon, rng)).astype(int)
    assert np.abs(gray[..., 0] - gray[..., 2]).max() <= 1


def _layout(*objects: tuple[int, int | None]) -> Layout:
    items = tuple(SceneObject(subject, cell, 0) for subject, cell in objects)
    return Layout(items, describe([load_concepts()[s].label for s, _ in objects], [c for _, c in objects]))


def _questions(layout: Layout, rounds: int = 40) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for seed in range(rounds):
        for question in scene_questions(layout, np.random.default_rng(seed)):
            found.setdefault(question.kind, []).append(question)
    return found


def test_questions_about_a_single():
    found = _questions(_layout((0, None)))
    assert set(found) == set(SINGLE_KINDS)
    assert found["label"][0].question == f"What is in the image?\n{PROMPT_SHORT}"
    assert found["label"][0].answer == "horse"
    assert found["count"][0].answer == "1"
    for question in found["choice"]:
        lines = question.question.split("\n")
        assert lines[-1] == PROMPT_CHOICE
        options = dict(line.split(". ", 1) for line in lines[1:5])
        assert list(options) == list("ABCD")
        assert len(set(options.values())) == 4
        assert options[question.answer] == "horse"
    assert len({question.answer for question in found["choice"]}) == 4
    for question, named in zip(found["choice"], found["choice_named"], strict=True):
        assert named.question == question.question.replace(PROMPT_CHOICE, PROMPT_CHOICE_NAMED)
        assert named.answer == f"horse: {question.answer}"


def test_yes_and_no_are_balanced_and_negatives_are_similar():
    concepts = load_concepts()
    group = {concept.label: concept.group for concept in concepts}
    found = _questions(_layout((0, 0), (10, 3)), rounds=200)
    answers = Counter(question.answer for question in found["exists"])
    assert 70 < answers["yes"] < 130
    for question in found["exists"]:
        asked = re.fullmatch(r"Is there an? (.+) in the image\?", question.question.split("\n")[0])
        assert asked is not None
        label = asked[1]
        assert (question.answer == "yes") == (label in ("horse", "watermelon"))
        assert group[label] in {group["horse"], group["watermelon"]}
    for question in found["exists_zh"]:
        text, prompt = question.question.split("\n")
        assert prompt == PROMPT_SHORT_ZH
        assert (question.answer == "有") == (text in ("图中有马吗？", "图中有西瓜吗？"))


def test_absent_things_may_be_of_any_group():
    concepts = load_concepts()
    group = {concept.label: concept.group for concept in concepts}
    questions = [
        question.question
        for seed in range(100)
        for question in scene_questions(_layout((0, None)), np.random.default_rng(seed), concepts, similar=0.0)
        if question.kind == "exists" and question.answer == "no"
    ]
    asked = [re.search(r"Is there an? (.+) in the image", question) for question in questions]
    assert len({group[label[1]] for label in asked if label}) > 2


def test_questions_about_places():
    found = _questions(_layout((0, 1), (10, 2)))
    assert set(found) == set(GRID_KINDS)
    where = {"top right": "horse", "bottom left": "watermelon"}
    for question in found["cell"]:
        cell = question.question.split("\n")[0].removeprefix("What is in the ").removesuffix("?")
        assert question.answer == where.get(cell, "nothing")
    assert {question.answer for question in found["cell"]} == {"horse", "watermelon", "nothing"}
    for question in found["place"]:
        label = question.question.split("\n")[0].removeprefix("Where is the ").removesuffix("?")
        assert where[question.answer] == label
        assert question.answer in CELLS


def test_one_option_is_in_the_image():
    found = _questions(_layout((0, 0), (10, 1), (20, 3)))
    present = {load_concepts()[subject].label for subject in (0, 10, 20)}
    asked, right = set(), set()
    for question, named in zip(found["choice"], found["choice_named"], strict=True):
        options = dict(line.split(". ", 1) for line in question.question.split("\n")[1:5])
        assert present & set(options.values()) == {options[question.answer]}
        assert named.answer == f"{options[question.answer]}: {question.answer}"
        asked.add(question.question.split("\n")[0])
        right.add(options[question.answer])
    assert asked == {"What is in the image?"}
    assert right == present


def test_letters_of_options():
    concepts = load_concepts()
    sizes, short = set(), 0
    for seed in range(200):
        question = ask_for_letters(np.random.default_rng(seed), concepts)
        *lines, asked = question.question.split("\n")
        options = {name: letter for letter, name in (line.split(". ", 1) for line in lines)}
        assert list(options.values()) == list("ABCDEFGH")[: len(options)]
        assert set(options) <= {concept.label for concept in concepts}
        pairs = [pair.split(": ") for pair in question.answer.split(", ")]
        assert asked == f"Which options are {', '.join(name for name, _ in pairs)}?"
        assert all(options[name] == letter for name, letter in pairs)
        sizes.add(len(options))
        short += all(len(name) <= 6 for name in options)
    assert sizes == set(range(2, 9))
    assert 50 < short < 110


@pytest.mark.parametrize("count", [2, 3, 7])
def test_lists_of_options_are_no_longer_than_there_are_concepts(count):
    lists = [ask_for_letters(np.random.default_rng(seed), load_concepts(count)).question for seed in range(50)]
    assert {text.count("\n") for text in lists} == set(range(2, count + 1))


def test_text_is_repeatable_and_complete():
    corpus = TextWorld("train", 400)
    documents = [corpus[index] for index in range(400)]
    assert documents == [TextWorld("train", 400)[index] for index in range(400)]
    assert all(document.endswith(END) for document in documents)
    chats = [document for document in documents if document.startswith(SYSTEM_MESSAGE)]
    captions = [document for document in documents if document.startswith("\n")]
    read = [document for document in documents if document.startswith("image: ")]
    assert len(chats) > 80
    assert len(captions) > 20
    assert len(read) > 160
    lines = [document.removesuffix(END).split("\n") for document in documents]
    assert sum(len(pair) == 2 and pair[0] == pair[1] for pair in lines) > 20  # names said twice
    assert {concept.subgroup for concept in load_concepts()} <= set(KINDS_OF_THINGS)
    with pytest.raises(IndexError, match="document 400"):
        corpus[400]
    with pytest.raises(ValueError, match="split is 'dev'"):
        TextWorld("dev", 1)


def test_chat_follows_the_template_of_the_release():
    turns = [Question("label", "What?", "horse"), Question("count", "How many?", "1")]
    assert chat(turns, "image: horse") == (
        f"{SYSTEM_MESSAGE} USER: image: horse\nWhat? ASSISTANT: horse </s>USER: How many? ASSISTANT: 1 </s>"
    )


def test_notes_leave_the_prompts_out():
    turns = _questions(_layout((0, None)))
    text = notes([turns["label"][0], turns["caption"][0], turns["exists_zh"][0]], "image: horse")
    first, *lines = text.removesuffix(END).split("\n")
    assert [first, *lines[:3]] == ["image: horse", "What is in the image?", "horse", "horse"]
    assert lines[3].startswith("图中有")
    assert lines[4] in ("有", "没有")


def test_prompts_end_before_the_answer():
    for prompt, question in prompts_with_answers("validation", 20):
        assert prompt.endswith(f"{question.question} ASSISTANT:")
