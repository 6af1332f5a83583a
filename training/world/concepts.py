"""The things of the world: 100 concepts with their names and drawings, and the wider set of all emoji.

A [`Subject`] is anything that can be put into a scene: a name and one drawing a vendor. The first subjects are always
the concepts of concepts.json, so the index of a concept is its index here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .icons import find_vendor_file, icon_names, install_icons, load_icons, present_vendors, resolve_icon

NUM_CONCEPTS = 100
"""How many concepts of concepts.json the world uses."""

_SKIPPED_ICONS = ("skin-tone", "flag", "keycap", "regional-indicator", "button", "-oclock", "clockface")


@dataclass(frozen=True)
class Concept:
    """
    One thing the world knows.

    Args:
        label (`str`): English name, for instance `"horse"`.
        zh (`str`): Chinese name.
        group (`str`): Group in emojibase, for instance `"animals-nature"`.
        subgroup (`str`): Subgroup, for instance `"animal-mammal"`.
        icon_names (`dict[str, str]`): Icon name by vendor; a vendor that does not draw the concept is absent.
    """

    label: str
    zh: str
    group: str
    subgroup: str
    icon_names: dict[str, str]


@lru_cache
def load_concepts(count: int = NUM_CONCEPTS) -> tuple[Concept, ...]:
    """
    The first `count` concepts, best first.

    Args:
        count (`int`, *optional*, defaults to 100): How many, in [1, 200].

    Raises:
        ValueError: If `count` is out of range.
    """
    entries = json.loads(Path(__file__).with_name("concepts.json").read_text(encoding="utf-8"))
    if not 1 <= count <= len(entries):
        raise ValueError(
            f"count is {count}, but concepts.json has {len(entries)} concepts: choose 1 to {len(entries)}."
        )
    return tuple(Concept(e["label"], e["zh"], e["group"], e["sub"], e["names"]) for e in entries[:count])


@dataclass(frozen=True)
class Subject:
    """
    Anything that can be put into a scene.

    Args:
        label (`str`): The name.
        drawings (`tuple[np.ndarray, ...]`): RGBA pixels of each drawing, `(96, 96, 4)` uint8, a vendor each.
        vendors (`tuple[str, ...]`): The vendor of each drawing.
    """

    label: str
    drawings: tuple[np.ndarray, ...]
    vendors: tuple[str, ...]


def load_subjects(
    concepts: Sequence[Concept], vendors: Sequence[str], source: Path, cache: Path | None = None
) -> list[Subject]:
    """
    The concepts as drawn by some vendors.

    Args:
        concepts (`Sequence[Concept]`): The concepts, one subject each, in this order.
        vendors (`Sequence[str]`): The vendors whose drawings are wanted.
        source (`Path`): Folder with the iconify JSON files.
        cache (`Path`, *optional*): Where rendered pixels are kept.

    Raises:
        ValueError: If none of the vendors draws one of the concepts.
    """
    icons = {
        vendor: load_icons(vendor, [c.icon_names[vendor] for c in concepts if vendor in c.icon_names], source, cache)
        for vendor in vendors
    }
    subjects = []
    for concept in concepts:
        drawn_by = [vendor for vendor in vendors if vendor in concept.icon_names]
        if not drawn_by:
            raise ValueError(f"The concept {concept.label!r} is drawn by none of the vendors {list(vendors)}.")
        drawings = tuple(icons[vendor].pixels[concept.icon_names[vendor]] for vendor in drawn_by)
        subjects.append(Subject(concept.label, drawings, tuple(drawn_by)))
    return subjects


def drawn_concepts(source: Path, vendors: Sequence[str]) -> tuple[Concept, ...]:
    """
    The leading concepts that a folder of icons can show: all 100, or fewer for a small folder.

    Args:
        source (`Path`): Folder with the iconify JSON files.
        vendors (`Sequence[str]`): The vendors to look at.

    Returns:
        `tuple[Concept, ...]`: A beginning of [`load_concepts`], so that indices stay the same.
    """
    names = {vendor: icon_names(find_vendor_file(source, vendor)) for vendor in vendors}
    concepts = load_concepts()
    for count, concept in enumerate(concepts):
        if not any(concept.icon_names.get(vendor, "").replace("-", "") in names[vendor] for vendor in vendors):
            return concepts[:count]
    return concepts


def training_subjects(icons: str | Path | None = None) -> list[Subject]:
    """
    The concepts as drawn by the training vendors.

    Args:
        icons (`str` or `Path`, *optional*): Folder with iconify JSON files, which may hold some of the vendors and
            some of the concepts only; by default all are installed with npm.

    Raises:
        FileNotFoundError: If the folder has none of the training vendors.
        ValueError: If it does not show a single concept.
    """
    source = Path(icons) if icons else install_icons()
    vendors = present_vendors(source)
    concepts = drawn_concepts(source, vendors)
    if not concepts:
        raise ValueError(f"The icons in {source} do not show {load_concepts()[0].label!r}, the first concept.")
    return load_subjects(concepts, vendors, source)


def load_other_subjects(concepts: Sequence[Concept], source: Path, cache: Path | None = None) -> list[Subject]:
    """
    All further emoji of the training vendors, for learning to see: those that are none of the concepts.

    Skin tone variants, flags, keycaps, buttons and clocks are left out: they differ in details only. Drawings of
    several vendors are one subject when their names are the same apart from hyphens; what only one vendor draws is left
    out.

    Args:
        concepts (`Sequence[Concept]`): The concepts to leave out.
        source (`Path`): Folder with the iconify JSON files.
        cache (`Path`, *optional*): Where rendered pixels are kept.
    """
    drawings: dict[str, list[tuple[str, np.ndarray]]] = {}
    labels: dict[str, str] = {}
    for vendor in present_vendors(source):
        collection = json.loads(find_vendor_file(source, vendor).read_text(encoding="utf-8"))
        taken = {resolve_icon(collection, c.icon_names[vendor])[0] for c in concepts if vendor in c.icon_names}
        wanted = [
            name
            for name in collection["icons"]
            if name not in taken and not any(part in name for part in _SKIPPED_ICONS)
        ]
        icons = load_icons(vendor, wanted, source, cache)
        for name, pixels in icons.pixels.items():
            key = name.replace("-", "")
            labels.setdefault(key, name.replace("-", " "))
            drawings.setdefault(key, []).append((vendor, pixels))
    known = {concept.label.lower().replace(" ", "") for concept in concepts}
    return [
        Subject(labels[key], tuple(p for _, p in drawn), tuple(v for v, _ in drawn))
        for key, drawn in sorted(drawings.items())
        if key not in known and len(drawn) > 1
    ]
