"""Pictures of a model card: what is drawn, that it is small, and what is said to what cannot be drawn."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from training.figures import break_lines, draw_loss_curves, draw_sample_sheet, loss_curves, main, read_log

LOG = [
    {"step": 10, "loss": 3.0, "text_loss": 1.0, "l1": 0.5, "learning_rate": 1e-3, "grad_norm": 2.0, "epoch": 0.1},
    {"step": 20, "loss": 2.0, "text_loss": 0.5, "l1": 0.25, "learning_rate": 1e-3, "grad_norm": 2.0, "epoch": 0.2},
    {"step": 20, "eval_loss": 2.5, "eval_text_loss": 0.75, "eval_runtime": 3.0, "epoch": 0.2},
    {"step": 20, "train_loss": 2.5, "train_runtime": 12.0, "epoch": 0.2},
]
SMALL = 150_000
"""Most bytes of a picture."""


def make_run(folder, log, place="."):
    (folder / place).mkdir(parents=True)
    (folder / place / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_the_terms_of_the_loss_are_the_curves():
    assert loss_curves(LOG) == {
        "loss": [(10, 3.0), (20, 2.0)],
        "text_loss": [(10, 1.0), (20, 0.5)],
        "l1": [(10, 0.5), (20, 0.25)],
        "eval_loss": [(20, 2.5)],
        "eval_text_loss": [(20, 0.75)],
    }


def test_the_history_of_an_unfinished_run_is_in_its_last_checkpoint(tmp_path):
    make_run(tmp_path / "run", LOG[:1], "checkpoint-10")
    make_run(tmp_path / "run", LOG[:2], "checkpoint-100")
    assert read_log(tmp_path / "run") == LOG[:2]
    make_run(tmp_path / "run", LOG, "done")
    (tmp_path / "run" / "done" / "trainer_state.json").rename(tmp_path / "run" / "trainer_state.json")
    assert read_log(tmp_path / "run") == LOG


def test_loss_curves_of_several_runs(tmp_path, capsys):
    steps = np.arange(1, 201)
    log = [{"step": int(s), **{f"loss_{i}": float(i + 9 / s) for i in range(6)}, "loss": float(30 / s)} for s in steps]
    runs = [str(make_run(tmp_path / name, log)) for name in ("clip", "tokenizer", "llm", "pretrain", "sft")]
    main([*runs, str(tmp_path / "curves.png")])
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'curves.png'}\n"
    draw_loss_curves(runs[:1], tmp_path / "one.png")
    sizes = {}
    for name in ("curves", "one"):
        assert (tmp_path / f"{name}.png").stat().st_size < SMALL
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes[name] = image.size
            colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
            assert (31, 119, 180) in colours  # the curve of the first term
    assert sizes["curves"] == (3 * sizes["one"][0], 2 * sizes["one"][1])


def test_runs_that_cannot_be_drawn_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least one folder"):
        draw_loss_curves([], tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere has no trainer_state.json"):
        draw_loss_curves([tmp_path / "nowhere"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="run has no loss of training yet"):
        draw_loss_curves([make_run(tmp_path / "run", LOG[2:])], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_sheet_shows_every_image_over_its_caption(tmp_path):
    colours = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 160, 0), (0, 160, 255)]
    images = [Image.new("RGB", (30 + 10 * i, 40), colour) for i, colour in enumerate(colours)]
    captions = ["a", "b", "", "d", "a caption that needs more than one line"]
    draw_sample_sheet(images, captions, tmp_path / "sheet.png", columns=3, side=60)
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.width == 3 * 60 + 4 * 8
    pixels = np.asarray(sheet)
    for place, colour in enumerate(colours):
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        assert place // 3 == rows.mean() // (sheet.height / 2)
        assert place % 3 == columns.mean() // (sheet.width / 3)
        assert max(np.ptp(rows), np.ptp(columns)) == 59  # fitted into a square of 60, not distorted
        left, top, height = 8 + place % 3 * 68, 8 + place // 3 * (sheet.height - 8) // 2, (sheet.height - 8) // 2
        below = pixels[top + 60 : top + height - 8, left : left + 60]
        assert (below.min() < 100) == bool(captions[place])  # letters, where there are some


def test_a_sheet_of_drawings_is_small(evaluation_folder, tmp_path):
    files = sorted((evaluation_folder / "unseen_vendor").glob("*.png"))[:18]
    draw_sample_sheet([Image.open(file) for file in files], ["a thing"] * 18, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size < SMALL


def test_a_caption_an_image(tmp_path):
    image = Image.new("RGB", (8, 8))
    for images, captions in (([image], []), ([image], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match=f"found {len(images)} images, {len(captions)} captions"):
            draw_sample_sheet(images, captions, tmp_path / "sheet.png")


@given(st.text(alphabet="ab lmw.", max_size=60), st.integers(10, 120))
def test_lines_fit_and_lose_no_word(text, width):
    font = ImageFont.load_default(12)
    lines = break_lines(text, font, width).split("\n")
    assert " ".join(lines).split() == text.split()
    assert all(font.getlength(line) <= width or " " not in line for line in lines)
