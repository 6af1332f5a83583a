"""The command line: what the verbs print, and what they say to mistakes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from libra_cli import loading
from libra_cli.main import build_parser, main


@pytest.fixture
def images(golden) -> list[str]:
    return [str(golden / "official_checkpoint" / f"image_{i}.png") for i in range(2)]


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with exit code 2 and one line on stderr; returns the line."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = [line for line in captured.err.splitlines() if "|" not in line]  # progress bars
        assert len(lines) == 1
        assert lines[0].startswith("libra: error: ")
        return lines[0]

    return run


def test_caption(repo, images, capsys):
    assert main(["caption", *images, "--model", str(repo), "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == images


def test_caption_as_json(repo, images, capsys):
    arguments = ["--model", str(repo), "--max-new-tokens", "4", "--batch-size", "1", "--json"]
    assert main(["caption", *images, *arguments]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["image"] for record in records] == images
    assert all(isinstance(record["text"], str) for record in records)


def test_prompt_asks_a_question(repo, images, golden, capsys):
    official = json.loads((golden / "official_checkpoint" / "expected.json").read_text(encoding="utf-8"))
    arguments = ["--model", str(repo), "--prompt", official["questions"][0], "--max-new-tokens", "4", "--json"]
    assert main(["caption", images[0], *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)["text"].rstrip("\ufffd")
    assert official["answers"][0].startswith(answer)


def test_caption_prompt_of_the_repository(repo, images, capsys, tmp_path):
    asked = tmp_path / "asked"
    assert main(["export", str(repo), str(asked), "--caption-prompt", "What is in this image?"]) == 0
    capsys.readouterr()
    texts = []
    for folder, prompt in ((asked, []), (repo, ["--prompt", "What is in this image?"]), (repo, [])):
        assert main(["caption", images[0], "--model", str(folder), "--max-new-tokens", "6", *prompt]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_model_from_the_environment(repo, images, capsys, monkeypatch):
    monkeypatch.setenv("LIBRA_MODEL", str(repo))
    assert main(["caption", images[0], "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(images[0])


def test_no_model_at_all(images, fails, monkeypatch, tmp_path):
    monkeypatch.delenv("LIBRA_MODEL", raising=False)
    monkeypatch.setattr(loading, "TINY_MODEL", tmp_path / "absent")
    assert "--model" in fails("caption", images[0])


def test_chat_reads_lines_from_a_pipe(repo, images, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"What is it?\n/image {images[1]}\nAnd this?\n"))
    assert main(["chat", "--image", images[0], "--model", str(repo), "--max-new-tokens", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "The image goes with your next question."
    assert len(lines) == 3


def test_convert_and_export(golden, tmp_path, capsys):
    release = golden / "official_checkpoint" / "checkpoint"
    (tmp_path / "card.md").write_text("# Mine\n")
    assert main(["convert", str(release), str(tmp_path / "a"), "--card", str(tmp_path / "card.md")]) == 0
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b"), "--weights-dtype", "float16"]) == 0
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'a'}\nWrote {tmp_path / 'b'}\n"
    assert (tmp_path / "b" / "README.md").read_text() == "# Mine\n"
    (tmp_path / "b" / "pipeline_libra.py").unlink()
    (tmp_path / "b" / "handler.py").write_text("mine")
    assert main(["update-code", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "pipeline_libra.py").is_file()
    assert "handler.py" in capsys.readouterr().err


def test_unreadable_images(repo, fails, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "broken.png" in fails("caption", str(tmp_path / "broken.png"), "--model", str(repo))
    assert "absent.png" in fails("caption", str(tmp_path / "absent.png"), "--model", str(repo))
    assert "absent.png" in fails("chat", "--image", str(tmp_path / "absent.png"), "--model", str(repo))


def test_wrong_folders(golden, repo, images, fails, tmp_path):
    assert "absent" in fails("caption", images[0], "--model", str(tmp_path / "absent"))
    assert "config.json" in fails("caption", images[0], "--model", str(tmp_path))
    assert "config.json" in fails("convert", str(tmp_path), str(tmp_path / "out"))
    assert "not empty" in fails("convert", str(golden / "official_checkpoint" / "checkpoint"), str(repo))
    assert "not empty" in fails("export", str(repo), str(repo))


def test_hub_repository_that_cannot_be_reached(images, fails, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "libra-team/absent" in fails("caption", images[0], "--model", "libra-team/absent")


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match="config"):
        main(["--traceback", "export", str(tmp_path), str(tmp_path / "out")])


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["caption"], ["caption", "x.png", "--max-new-tokens", "0"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: libra" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["serve", "demo"])
@pytest.mark.parametrize("port", ["-1", "65536", "99999", "http"])
def test_ports_there_are_not(verb, port, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--port", port])
    assert caught.value.code == 2
    assert "argument --port" in capsys.readouterr().err


def test_ports_there_are():
    parser = build_parser()
    assert [parser.parse_args(["serve", "--port", port]).port for port in ("0", "1", "65535")] == [0, 1, 65535]
    assert parser.parse_args(["demo", "--port", "65535"]).port == 65535


def test_help_does_not_wait_for_torch():
    script = "import sys; from libra_cli.main import build_parser; build_parser(); print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "False"
