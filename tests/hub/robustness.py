"""What was done to Libra to see whether it says so: broken files, files of others, files that are traps.

    PYTHONPATH=. python -m tests.hub.robustness       # writes the table of ROBUSTNESS.md anew

A case is a function that takes the folder of a good repository and a folder to work in, does the damage, uses the result
as a user would, and returns what the user is told. Each row of the table is a test (`test_robustness.py`).
"""

import contextlib
import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from libra_cli.loading import load_libra
from libra_cli.main import main
from processing.image_processing_libra import read_image

TABLE = Path(__file__).with_name("ROBUSTNESS.md")


class Case(NamedTuple):
    """
    Args:
        entry (`str`): where it goes in.
        damage (`str`): what was done.
        run (`Callable`): (good repository, folder to work in) -> what the user is told.
        told (`str`): what the user must be told, or a part of it.
    """

    entry: str
    damage: str
    run: Callable[[Path, Path], str]
    told: str


def command(*arguments: object) -> str:
    """Runs a command that must be refused, with exit code 2 and one line on stderr; returns the line."""
    errors, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        code = main([str(argument) for argument in arguments])
    lines = [line for line in errors.getvalue().splitlines() if "|" not in line]  # progress bars
    assert (code, len(lines)) == (2, 1), (code, lines)
    assert lines[0].startswith("libra: error: ")
    return lines[0]


def raised(function: Callable) -> str:
    """What a call raises as a ValueError."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        function()
    return str(caught.value)


def sample_image(folder: Path) -> Path:
    path = folder / "sample.png"
    if not path.exists():
        pixels = np.kron(np.random.default_rng(0).integers(0, 256, (4, 6, 3)), np.ones((8, 8, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


# ---- repositories ----


def with_model(damage: Callable[[Path], object]) -> Callable[[Path, Path], str]:
    """`libra caption` with a copy of a good repository that was damaged."""

    def run(repo: Path, folder: Path) -> str:
        model = Path(shutil.copytree(repo, folder / "model"))
        damage(model)
        return command("caption", sample_image(folder), "--model", model, "--max-new-tokens", 2)

    return run


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def cut(name: str, keep: int = -1000) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:keep])


def edit(name: str, **fields) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        content = json.loads((model / name).read_text(encoding="utf-8")) | fields
        (model / name).write_text(json.dumps(content), encoding="utf-8")

    return change


def edit_text_config(**fields) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        text = json.loads((model / "config.json").read_text(encoding="utf-8"))["text_config"]
        edit("config.json", text_config=text | fields)(model)

    return change


def edit_rope(**fields) -> Callable[[Path], object]:
    return edit_text_config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | fields)


def edit_image_processor(**fields) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        content = json.loads((model / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
        edit("processor_config.json", image_processor=content | fields)(model)

    return change


def edit_weights(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    def run(model: Path) -> None:
        weights = load_file(model / name)
        change(weights)
        save_file(weights, model / name, metadata={"format": "pt"})

    return run


def as_pickle(model: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()
    torch.save({"weight": torch.zeros(1)}, model / "pytorch_model.bin")


def as_adapter(content: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        shutil.rmtree(model)
        model.mkdir()
        (model / "adapter_config.json").write_text(content, encoding="utf-8")

    return change


SHARD, LAST_SHARD, INDEX = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)
CODER = "image_tokenizer/model.safetensors"
HUGE_HEADER = (2**60).to_bytes(8, "little") + b"{}"

REPOSITORIES = [
    Case("weights", "a shard is missing", with_model(remove(SHARD)), f"lacks the shards {SHARD}"),
    Case("weights", "a shard cut short", with_model(cut(LAST_SHARD)), f"{LAST_SHARD} is not a whole safetensors file"),
    Case("weights", "an empty shard", with_model(write(SHARD, b"")), f"{SHARD} is not a whole safetensors file"),
    Case("weights", "random bytes", with_model(write(SHARD, bytes(range(256)))), "not a whole safetensors file"),
    Case("weights", "a header of 2^60 bytes", with_model(write(SHARD, HUGE_HEADER)), "header too large"),
    Case("weights", "a pointer of git LFS", with_model(write(SHARD, b"version https://git-lfs")), "not a pointer?"),
    Case("weights", "a pickle instead", with_model(as_pickle), "has no weights: neither"),
    Case("weights", "the index is no JSON", with_model(write(INDEX, b"{")), f"{INDEX} is not valid JSON"),
    Case(
        "weights",
        "the index leads out of the folder",
        with_model(edit(INDEX, weight_map={"lm_head.weight": "../x.safetensors"})),
        "a file beside the index is expected",
    ),
    Case(
        "weights",
        "one is missing, and in the index too",
        with_model(edit_text_config(num_hidden_layers=4)),
        "missing keys",
    ),
    Case("weights", "of other sizes", with_model(edit_text_config(intermediate_size=96)), "mismatched keys"),
    Case(
        "weights",
        "NaN",
        with_model(edit_weights(SHARD, lambda weights: weights[min(weights)].fill_(torch.nan))),
        "hold NaN or infinite numbers",
    ),
    Case("image tokenizer", "weights cut short", with_model(cut(CODER)), f"{CODER} is not a whole safetensors file"),
    Case("image tokenizer", "weights missing", with_model(remove(CODER)), "image_tokenizer has no weights"),
    Case(
        "image tokenizer",
        "infinite weights",
        with_model(edit_weights(CODER, lambda weights: weights["pre_quant.bias"].fill_(torch.inf))),
        "hold NaN or infinite numbers: pre_quant.bias",
    ),
    Case(
        "image tokenizer", "none", with_model(lambda model: shutil.rmtree(model / "image_tokenizer")), "it lacks image"
    ),
    Case("config.json", "no JSON", with_model(write("config.json", b"{")), "config.json is not valid JSON"),
    Case("config.json", "no UTF-8", with_model(write("config.json", b"\xff\xfe{}")), "config.json is not valid JSON"),
    Case("config.json", "a list", with_model(write("config.json", b"[]")), "must hold a JSON object, found a list"),
    Case("config.json", "none", with_model(remove("config.json")), "it has no config.json"),
    Case("config.json", "of a later model", with_model(edit("config.json", model_type="libra2")), "type 'libra2'"),
    Case(
        "config.json",
        "a later language model",
        with_model(edit_text_config(model_type="llama9")),
        "text_config.model_type is 'llama9'; Libra routes the layers of",
    ),
    Case(
        "config.json",
        "of a later transformers",
        with_model(edit("config.json", transformers_version="99.0.0")),
        "was written with transformers 99.0.0",
    ),
    Case(
        "config.json",
        "fields we do not know",
        with_model(edit("config.json", use_3d_bridge=True)),
        "fields this version of Libra does not know: use_3d_bridge",
    ),
    Case(
        "config.json", "a text for a number", with_model(edit("config.json", image_grid="4")), "expected int, got str"
    ),
    Case(
        "config.json",
        "a size of zero",
        with_model(edit("config.json", bridge_rank=0)),
        "bridge_rank must be at least 1",
    ),
    Case(
        "config.json",
        "a million layers",
        with_model(edit_text_config(num_hidden_layers=10**6)),
        "is of a model with 1000000 layers; there are only",
    ),
    Case(
        "config.json",
        "no attention heads",
        with_model(edit_text_config(num_attention_heads=0)),
        "config.json cannot be used: ZeroDivisionError",
    ),
    Case(
        "config.json",
        "positions of an unknown type",
        with_model(edit_rope(rope_type="evil")),
        "config.json cannot be used: KeyError: 'evil'",
    ),
    Case(
        "config.json",
        "an unknown activation",
        with_model(edit_text_config(hidden_act="evil")),
        "config.json cannot be used: KeyError: 'evil'",
    ),
    Case(
        "config.json",
        "an unknown dtype",
        with_model(edit("config.json", dtype="evil")),
        "config.json cannot be used: AttributeError",
    ),
    Case(
        "config.json",
        "a padding id there is not",
        with_model(edit_text_config(pad_token_id=99999)),
        "pad_token_id must be an id of the vocabulary, in [0, 360), found 99999",
    ),
    Case(
        "config.json",
        "an epsilon below 0",
        with_model(edit_text_config(rms_norm_eps=-1.0)),
        "text_config.rms_norm_eps must be greater than 0",
    ),
    Case(
        "config.json",
        "a rope_theta of 0",
        with_model(edit_rope(rope_theta=0.0)),
        "text_config.rope_theta must be greater than 0",
    ),
    Case(
        "config.json",
        "a context of 0",
        with_model(edit_text_config(max_position_embeddings=0)),
        "text_config.max_position_embeddings must be greater than 0",
    ),
    Case(
        "config.json",
        "of no version of transformers",
        with_model(edit("config.json", transformers_version="abc")),
        "transformers_version 'abc'; expected one such as",
    ),
    Case(
        "config.json",
        "a null for the version of transformers",
        with_model(edit("config.json", transformers_version=None)),
        "transformers_version None; expected one such as",
    ),
    Case(
        "generation_config.json",
        "an end id there is not",
        with_model(edit("generation_config.json", eos_token_id=[2, 10**9])),
        "eos_token_id must be an id of the vocabulary",
    ),
    Case("generation_config.json", "no JSON", with_model(write("generation_config.json", b"{")), "is not valid JSON"),
    Case(
        "generation_config.json",
        "a text for a number",
        with_model(edit("generation_config.json", max_new_tokens="many")),
        "generation_config.json cannot be used",
    ),
    Case(
        "processor", "no configuration", with_model(remove("processor_config.json")), "it lacks processor_config.json"
    ),
    Case(
        "processor", "no JSON", with_model(write("processor_config.json", b"{")), "processor_config.json is not valid"
    ),
    Case(
        "processor",
        "of a model with more text ids",
        with_model(edit("processor_config.json", text_vocab_size=400)),
        "text ids: 360 and 400",
    ),
    Case(
        "processor",
        "a tokenizer with more ids than the model",
        with_model(edit("processor_config.json", text_vocab_size=300)),
        "The tokenizer has ids up to",
    ),
    Case(
        "processor",
        "a longest text that is no number",
        with_model(edit("tokenizer_config.json", model_max_length="x")),
        "tokenizer_config.json has model_max_length 'x'; expected",
    ),
    Case(
        "processor",
        "a mean of two colours",
        with_model(edit_image_processor(image_mean=[0, 0])),
        "mean must have 3 elements",
    ),
    Case(
        "processor",
        "a deviation of 0",
        with_model(edit_image_processor(image_std=[0, 0, 0])),
        "it makes NaN or infinite numbers of an image",
    ),
    Case("processor", "images of another size", with_model(edit("config.json", image_grid=5)), "along a side: 5 and 4"),
    Case("processor", "no tokenizer", with_model(remove("tokenizer.json")), "it lacks tokenizer.json or"),
    Case(
        "processor", "tokenizer is no JSON", with_model(write("tokenizer.json", b"{")), "No processor could be loaded"
    ),
    Case("processor", "tokenizer is no UTF-8", with_model(write("tokenizer.json", b"\xff")), "can't decode byte 0xff"),
    Case(
        "processor", "template breaks off", with_model(write("chat_template.jinja", b"{% for")), "No processor could be"
    ),
    Case(
        "processor", "template is no UTF-8", with_model(write("chat_template.jinja", b"\xff")), "can't decode byte 0xff"
    ),
    Case("adapter", "no JSON", with_model(as_adapter("{")), "adapter_config.json is not valid JSON"),
    Case("adapter", "of a model that is not there", with_model(as_adapter("{}")), "which is not there"),
    Case(
        "adapter",
        "no weights",
        lambda repo, folder: with_model(as_adapter(json.dumps({"base_model_name_or_path": str(repo)})))(repo, folder),
        "adapter_model.safetensors is missing",
    ),
]

# ---- images ----


def with_image(name: str, make: Callable[[Path], object]) -> Callable[[Path, Path], str]:
    """`libra caption` of an image that cannot be used."""

    def run(repo: Path, folder: Path) -> str:
        make(folder / name)
        return command("caption", folder / name, "--model", repo, "--max-new-tokens", 2)

    return run


def picture(folder: Path) -> Image.Image:
    return Image.open(sample_image(folder)).convert("RGB")


def read_like(save: Callable[[Image.Image, Path], object], name: str, like=lambda image: image) -> Callable:
    """An unusual file that must be read as the picture it shows, to 12 of 255 levels in the mean."""

    def run(repo: Path, folder: Path) -> str:
        save(picture(folder), folder / name)
        found, expected = np.asarray(read_image(folder / name), float), np.asarray(like(picture(folder)), float)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 12
        return "read as it looks"

    return run


def bomb(path: Path, width: int, height: int) -> None:
    """A PNG of a few kilobytes that unpacks to width * height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width // 8 + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def cut_picture(path: Path) -> None:
    picture(path.parent).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])


def animation(path: Path) -> None:
    first = picture(path.parent)
    first.save(path, save_all=True, append_images=[first.rotate(180)])


def turned(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to show it"
    image.save(path, exif=exif, quality=95)


def deep(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


IMAGES = [
    Case("image", "20000 x 20000 pixels in a small PNG", with_image("b.png", lambda p: bomb(p, 20000, 20000)), "b.png"),
    Case(
        "image", "12100 x 9000 pixels", with_image("b.png", lambda p: bomb(p, 12100, 9000)), "at most 12000 on a side"
    ),
    Case(
        "image",
        "1 x 60000 pixels: small, but the square around it is not",
        with_image("long.png", lambda path: Image.new("RGB", (1, 60000)).save(path)),
        "1 x 60000 pixels; at most 12000 on a side",
    ),
    Case("image", "a PNG cut short", with_image("x.png", cut_picture), "x.png: the image data is broken or cut short"),
    Case("image", "a JPEG cut short", with_image("x.jpg", cut_picture), "x.jpg: the image data is broken or cut short"),
    Case("image", "no bytes", with_image("x.png", lambda path: path.write_bytes(b"")), "is empty (0 bytes)"),
    Case("image", "text", with_image("x.png", lambda path: path.write_text("no image")), "x.png: not a readable image"),
    Case("image", "an SVG", with_image("x.svg", lambda path: path.write_text("<svg/>")), "x.svg: not a readable image"),
    Case("image", "a folder", with_image("x.png", lambda path: path.mkdir()), "there is no image file"),
    Case("image", "no such file", with_image("x.png", lambda path: None), "there is no image file"),
    Case("image", "an animation", with_image("x.gif", animation), "a GIF with 2 frames. Pass one frame"),
    Case("image", "a palette", read_like(lambda image, path: image.quantize(64).save(path), "x.png"), "read"),
    Case(
        "image", "16 bit grayscale", read_like(deep, "x.png", lambda image: image.convert("L").convert("RGB")), "read"
    ),
    Case("image", "CMYK", read_like(lambda image, path: image.convert("CMYK").save(path, quality=95), "x.jpg"), "read"),
    Case(
        "image",
        "turned by its EXIF",
        read_like(turned, "x.jpg", lambda image: image.transpose(Image.Transpose.ROTATE_270)),
        "read",
    ),
]

# ---- ids and tensors ----


def with_ids(change: Callable, features: Callable = lambda features: features) -> Callable[[Path, Path], str]:
    """A forward pass with ids and features that no processor makes."""

    def run(repo: Path, folder: Path) -> str:
        model, processor = load_libra(repo)
        inputs = processor(text="<image>\nA", images=picture(folder), return_tensors="pt")
        ids = inputs["input_ids"]
        place = int((ids[0] == processor.boi_token_id).nonzero())
        change(ids, place, processor)
        return raised(lambda: model(input_ids=ids, image_features=features(inputs["image_features"])))

    return run


def put(offset: int, value: Callable) -> Callable:
    def change(ids, place, processor) -> None:
        ids[0, place + offset] = value(processor)

    return change


def nothing(ids, place, processor) -> None:
    """Leaves the ids as they are."""


def with_decoding(ids: Callable) -> Callable[[Path, Path], str]:
    def run(repo: Path, folder: Path) -> str:
        processor = load_libra(repo)[1]
        return raised(lambda: processor.post_process_multimodal_output(ids(processor), generation_mode="image"))

    return run


IDS = [
    Case("ids", "below 0", with_ids(put(0, lambda processor: -1)), "Row 0 of input_ids has id -1"),
    Case("ids", "past EOI", with_ids(put(0, lambda processor: processor.eoi_token_id + 1)), "ids must be in"),
    Case("ids", "text inside an image", with_ids(put(2, lambda processor: 5)), "broken image block at position"),
    Case("ids", "EOI too early", with_ids(put(3, lambda processor: processor.eoi_token_id)), "broken image block"),
    Case("ids", "no BOI", with_ids(put(0, lambda processor: 5)), "broken image block"),
    Case(
        "ids", "features of two images for one", with_ids(nothing, lambda f: f.repeat(2, 1, 1)), "holds 2 images, but"
    ),
    Case("ids", "features of another width", with_ids(nothing, lambda f: f[..., :-1]), "image_features has shape"),
    Case("ids", "NaN features", with_ids(nothing, lambda f: f * torch.nan), "holds NaN or infinite values"),
    Case("ids", "to draw: no image", with_decoding(lambda processor: [1, 2]), "holds no image"),
    Case("ids", "to draw: half an image", with_decoding(lambda p: [p.boi_token_id, p.text_vocab_size]), "has 1 codes"),
    Case("ids", "to draw: out of range", with_decoding(lambda p: [p.eoi_token_id + 9]), "is no id of this model"),
]

# ---- texts ----


LATIN = "Ein Käfer".encode("latin1")


def with_text(name: str, content: bytes, *arguments: str) -> Callable[[Path, Path], str]:
    """A command that reads a text file: FILE stands for it, FOLDER for the folder it is in, REPO for a repository."""

    def run(repo: Path, folder: Path) -> str:
        sample_image(folder)
        (folder / name).write_bytes(content)
        places = {"FILE": folder / name, "FOLDER": folder, "REPO": repo, "OUT": folder / "out"}
        return command(*(places.get(argument, argument) for argument in arguments))

    return run


SFT = ("train", "sft", "--output_dir", "OUT", "--model", "REPO", "--use_cpu", "--dataset", "FILE")
PRETRAIN = ("train", "pretrain", "--output_dir", "OUT", "--model", "REPO", "--use_cpu", "--max_steps", "1", "--dataset")

TEXTS = [
    Case(
        "text", "a card in latin1", with_text("card.md", LATIN, "export", "REPO", "OUT", "--card", "FILE"), "card.md is"
    ),
    Case(
        "text",
        "chats in latin1",
        with_text("chats.json", b'[{"id": "' + LATIN + b'"}]', *SFT),
        "chats.json is not valid",
    ),
    Case("text", "chats that break off", with_text("chats.jsonl", b'{"id": 1', *SFT), "chats.jsonl is not valid"),
    Case("text", "a list that is no chat", with_text("chats.json", b"[1]", *SFT), "must hold a list of samples"),
    Case(
        "text", "a caption in latin1", with_text("sample.txt", LATIN, *PRETRAIN, "FOLDER"), "sample.txt is not text in"
    ),
    Case(
        "text",
        "captions in latin1",
        with_text("metadata.csv", LATIN, *PRETRAIN, "FOLDER"),
        "metadata.csv is not text in",
    ),
    Case(
        "text", "COCO's json breaks off", with_text("coco.json", b"{", *PRETRAIN, "FILE"), "coco.json is not valid JSON"
    ),
    Case(
        "text",
        "documents in latin1",
        with_text("d.txt", LATIN, "train", "llm", "--output_dir", "OUT", "--dataset", "FILE"),
        "d.txt is not text",
    ),
]

CASES = [*REPOSITORIES, *IMAGES, *IDS, *TEXTS]


def table() -> str:
    """The table of all cases, Markdown."""
    lines = ["| where | what | what is said |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {case.entry} | {case.damage} | {case.told} |" for case in CASES)]) + "\n"


if __name__ == "__main__":
    head = TABLE.read_text(encoding="utf-8").partition("| where |")[0]
    TABLE.write_text(head + table(), encoding="utf-8")
