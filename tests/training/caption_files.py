"""Captioned images in the layouts of the web, for tests of pretraining."""

import io
import json
import tarfile

from PIL import Image

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "orange", "purple", "pink", "brown", "gray", "cyan")


def encode(colour, size=(48, 48), kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members: dict[str, bytes]):
    """A tar with these files, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder, shards=4, rows=6):
    """Tars as img2dataset writes them, each caption different: `a red square 0`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = {}
        for row in range(rows):
            number = shard * rows + row
            colour = COLOURS[number % len(COLOURS)]
            key, caption = f"{shard:05}{row:04}", f"a {colour} square {number}"
            members[f"{key}.jpg"] = encode(colour, kind="JPEG")
            members[f"{key}.txt"] = caption.encode()
            members[f"{key}.json"] = json.dumps({"caption": caption.upper(), "url": "x"}).encode()
        write_tar(folder / f"{shard:05}.tar", members)
    return folder


def captions_of(shards=4, rows=6) -> list[str]:
    return [f"a {COLOURS[number % len(COLOURS)]} square {number}" for number in range(shards * rows)]
