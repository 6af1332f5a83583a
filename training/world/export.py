"""
Writes the small files that tests need without npm: a few icons, and evaluation images with their labels.

    python -m training.world.export tests/data

Only drawings that may be passed on with their notices are written: Noto, Twemoji and Fluent Emoji Flat.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .concepts import Concept, load_concepts, load_subjects
from .icons import UNSEEN_VENDOR, find_vendor_file, install_icons, resolve_icon
from .scenes import Scene, World, evaluation_images

EXPORTED_VENDORS = ("noto", "twemoji", UNSEEN_VENDOR)
"""Vendors whose drawings may be committed."""

NUM_EXPORTED_ICONS = 8
"""How many concepts the small set of icons shows."""


def export_icons(source: Path, target: Path, concepts: Sequence[Concept]) -> None:
    """
    Write iconify JSON files with a few icons of each exported vendor, with their licences.

    Args:
        source (`Path`): Folder with the whole iconify JSON files.
        target (`Path`): Folder to write `<vendor>/icons.json` to.
        concepts (`Sequence[Concept]`): What the icons show.
    """
    for vendor in EXPORTED_VENDORS:
        path = find_vendor_file(source, vendor)
        collection = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(resolve_icon(collection, concept.icon_names[vendor])[0] for concept in concepts)
        small = {
            "prefix": collection["prefix"],
            "info": json.loads(path.with_name("info.json").read_text(encoding="utf-8")),
            "width": collection["width"],
            "height": collection["height"],
            "icons": {name: collection["icons"][name] for name in names},
        }
        (target / vendor).mkdir(parents=True, exist_ok=True)
        text = json.dumps(small, indent=1, ensure_ascii=False) + "\n"
        (target / vendor / "icons.json").write_text(text, encoding="utf-8")


def export_singles(world: World, count: int, target: Path) -> list[dict[str, str]]:
    """
    Write singles as PNG files.

    Args:
        world ([`World`]): Whose subjects are shown, one after the other.
        count (`int`): How many images.
        target (`Path`): Folder to write to; it is created.

    Returns:
        `list[dict[str, str]]`: `file`, `label` and `vendor` of each image.
    """
    target.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, scene in enumerate(evaluation_images(world, count)):
        name = f"{index:03d}.png"
        scene.image.save(target / name, optimize=True)
        rows.append({"file": f"{target.name}/{name}", "label": scene.caption, "vendor": _vendor(world, scene)})
    return rows


def _vendor(world: World, scene: Scene) -> str:
    item = scene.objects[0]
    return world.subjects[item.subject].vendors[item.drawing]


def main() -> None:
    """Write `icons/` and `eval/` into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="Folder to write to, for instance tests/data.")
    target = parser.parse_args().target
    source = install_icons()
    concepts = load_concepts()
    export_icons(source, target / "icons", concepts[:NUM_EXPORTED_ICONS])
    unseen = World(load_subjects(concepts, (UNSEEN_VENDOR,), source), "test", 100, pastel_fraction=0.0)
    known = World(load_subjects(concepts, ("noto", "twemoji"), source), "validation", 100, pastel_fraction=0.0)
    rows = {
        "unseen_vendor": export_singles(unseen, 100, target / "eval" / "unseen_vendor"),
        "train_vendors": export_singles(known, 100, target / "eval" / "train_vendors"),
    }
    labels = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    (target / "eval" / "labels.json").write_text(labels, encoding="utf-8")


if __name__ == "__main__":
    main()
