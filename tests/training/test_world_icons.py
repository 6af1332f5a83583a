"""Icons: lookup, rendering, caching, installation."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from training.world import icons as icons_module
from training.world.concepts import (
    drawn_concepts,
    load_concepts,
    load_other_subjects,
    load_subjects,
    training_subjects,
)
from training.world.icons import (
    UNSEEN_VENDOR,
    find_vendor_file,
    icon_svg,
    install_icons,
    load_icons,
    present_vendors,
    render_icon,
    resolve_icon,
)

COLLECTION = {
    "prefix": "toy",
    "width": 10,
    "height": 10,
    "icons": {
        "red-square": {"body": '<path fill="#f00" d="M2 4h2v2H2z"/>'},
        "empty": {"body": ""},
    },
    "aliases": {"square": {"parent": "red-square"}, "flipped": {"parent": "square", "hFlip": True}},
}


def test_names_are_found_without_hyphens_and_through_aliases():
    assert resolve_icon(COLLECTION, "redsquare") == ("red-square", False)
    assert resolve_icon(COLLECTION, "square") == ("red-square", False)
    assert resolve_icon(COLLECTION, "flipped") == ("red-square", True)
    with pytest.raises(KeyError, match="'toy' has no icon 'horse'"):
        resolve_icon(COLLECTION, "horse")


def test_rendering_crops_to_what_is_drawn():
    pixels = render_icon(icon_svg(COLLECTION, "red-square"), size=16)
    assert pixels.shape == (16, 16, 4)
    assert pixels.dtype == np.uint8
    assert (pixels[4:12, 4:12] == [255, 0, 0, 255]).all()  # the small square fills the icon


def test_a_flipped_alias_is_mirrored():
    tall = {"prefix": "t", "width": 10, "height": 10, "icons": {"l": {"body": '<path d="M0 0h2v8h8v2H0z"/>'}}}
    tall["aliases"] = {"j": {"parent": "l", "hFlip": True}}
    straight, mirrored = (render_icon(icon_svg(tall, name), 32) for name in "lj")
    assert np.abs(straight[:, ::-1].astype(int) - mirrored).max() <= 2


def test_an_empty_icon_is_refused():
    with pytest.raises(ValueError, match="empty"):
        render_icon(icon_svg(COLLECTION, "empty"))


def test_icons_are_rendered_once(icons, tmp_path, monkeypatch):
    first = load_icons("noto", ["horse", "bear"], icons, tmp_path)
    monkeypatch.setattr(icons_module, "render_icon", lambda *_: pytest.fail("rendered again"))
    again = load_icons("noto", ["bear", "horse"], icons, tmp_path)
    assert sorted(first.pixels) == ["bear", "horse"]
    assert all((first.pixels[name] == again.pixels[name]).all() for name in first.pixels)
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_missing_vendor_is_named(icons, tmp_path):
    with pytest.raises(FileNotFoundError, match="No icons of 'emojione'"):
        find_vendor_file(icons, "emojione")
    with pytest.raises(FileNotFoundError, match="none of the vendors noto"):
        present_vendors(tmp_path)


def test_subjects_follow_the_concepts(icons):
    subjects = training_subjects(icons)
    concepts = drawn_concepts(icons, ("noto", "twemoji"))
    assert concepts == load_concepts(8)
    assert [subject.label for subject in subjects] == [concept.label for concept in concepts]
    assert all(subject.vendors == ("noto", "twemoji") for subject in subjects)
    assert all(drawing.shape == (96, 96, 4) for subject in subjects for drawing in subject.drawings)


def test_training_subjects_never_show_the_unseen_vendor(icons):
    unseen = load_subjects(load_concepts(8), (UNSEEN_VENDOR,), icons)
    known = training_subjects(icons)
    for mine, other in zip(known, unseen):
        assert UNSEEN_VENDOR not in mine.vendors
        assert not any((drawing == other.drawings[0]).all() for drawing in mine.drawings)


def test_other_subjects_leave_the_concepts_out(icons):
    assert [subject.label for subject in load_other_subjects(load_concepts(8), icons)] == []
    labels = [subject.label for subject in load_other_subjects(load_concepts(3), icons)]
    assert len(labels) == 5
    assert "horse" not in labels


def test_concepts_count_is_checked():
    assert len(load_concepts()) == 100
    with pytest.raises(ValueError, match="200 concepts"):
        load_concepts(201)


def test_install_says_what_npm_said(tmp_path, monkeypatch):
    monkeypatch.setattr(icons_module.shutil, "which", lambda _: "/usr/bin/npm")
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no network")
    monkeypatch.setattr(icons_module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="no network"):
        install_icons(tmp_path)
    monkeypatch.setattr(icons_module.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"Install Node\.js"):
        install_icons(tmp_path)


def test_install_keeps_what_is_there(tmp_path, monkeypatch):
    for package in icons_module._NPM_PACKAGES:
        folder = tmp_path / "npm" / "node_modules" / package
        folder.mkdir(parents=True)
        (folder / "package.json").write_text("{}")
    monkeypatch.setattr(icons_module.subprocess, "run", lambda *_, **__: pytest.fail("npm was called"))
    assert install_icons(tmp_path) == tmp_path / "npm" / "node_modules"


def test_committed_evaluation_images_show_every_concept(evaluation_folder):
    labels = json.loads((evaluation_folder / "labels.json").read_text(encoding="utf-8"))
    names = [concept.label for concept in load_concepts()]
    assert [row["label"] for row in labels["unseen_vendor"]] == names
    assert [row["label"] for row in labels["train_vendors"]] == names
    assert {row["vendor"] for row in labels["unseen_vendor"]} == {UNSEEN_VENDOR}
    assert {row["vendor"] for row in labels["train_vendors"]} == {"noto", "twemoji"}
    for row in (*labels["unseen_vendor"], *labels["train_vendors"]):
        with Image.open(evaluation_folder / row["file"]) as image:
            assert (image.size, image.mode) == ((96, 96), "RGB")
            assert image.getpixel((0, 0)) == (255, 255, 255) or image.getpixel((95, 0)) == (255, 255, 255)
