"""libra complete, draw, reconstruct, attention: a figure each on libra-tiny, and errors before a model is loaded."""

from pathlib import Path

import pytest
from PIL import Image

from libra_cli.main import main
from training.analysis import looks

ROOT = Path(__file__).resolve().parents[2]
IMAGE, TINY = str(ROOT / "samples" / "airplane.png"), str(ROOT / "hub_configs" / "libra-tiny")


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (
            ["complete", IMAGE, "--rows", "7", "--samples", "1", "--beside", f"again={TINY}"],
            "again: mean log-likelihood",
        ),
        (["draw", "horse", "--samples", "1", "--top-k", "5"], "Wrote"),
        (["reconstruct", IMAGE], "airplane.png: PSNR 22."),
        (["attention", IMAGE, "What is in the image?", "--beside", f"again={TINY}"], "again: airplane"),
        (["attention", IMAGE, "--answer", "key", "--heads"], "libra-tiny: key"),
    ],
)
def test_writes_a_figure(arguments, printed, tmp_path, capsys):
    output = tmp_path / "figure.png"
    assert main([*arguments, "--model", TINY, "--output", str(output)]) == 0
    assert printed in capsys.readouterr().out
    assert Image.open(output).width > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["complete", IMAGE, "--rows", "8", "--output", "a.png"], "--rows is 8, but an image of"),
        (["complete", "absent.png", "--rows", "1", "--output", "a.png"], "There is no image absent.png"),
        (["complete", IMAGE, "--rows", "1", "--beside", "x", "--output", "a.png"], "Expected LABEL=MODEL"),
        (["draw", "a", "--temperature", "0", "--output", "a.png"], "temperature must be at least 1e-06"),
        (["draw", "a", "--output", "a.svg"], "ends in .png"),
        (["reconstruct", IMAGE, "--output", "absent/a.png"], "There is no folder absent"),
        (["attention", IMAGE, "--heads", "--beside", f"b={TINY}", "--output", "a.png"], "leave out --beside"),
    ],
)
def test_errors_come_before_a_model_is_loaded(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(looks, "load_libra", lambda *args: pytest.fail("a model was loaded"))
    assert main([*arguments, "--model", TINY]) == 2
    assert message in capsys.readouterr().err
