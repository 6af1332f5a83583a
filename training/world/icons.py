"""Icons of the world: where they come from, how they are rendered, and where the pixels are kept.

The icons are emoji drawings published as npm packages of iconify JSON files (`@iconify-json/<vendor>`). They are
installed once into a cache folder, rendered with resvg and cached as one `.npz` a vendor. Any folder that holds
`<vendor>/icons.json` files works as a source too, which is what the tests use.

Licences of the drawings: see NOTICE.md next to this file.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN_VENDORS = ("noto", "noto-v1", "twemoji", "emojione", "fxemoji")
"""Vendors whose drawings are trained on."""

UNSEEN_VENDOR = "fluent-emoji-flat"
"""The vendor kept for testing: nothing is trained, tuned or selected on it."""

ICON_SIZE = 96
"""Side of a rendered icon in pixels."""

_NPM_PACKAGES = (*(f"@iconify-json/{vendor}" for vendor in (*TRAIN_VENDORS, UNSEEN_VENDOR)), "emojibase-data")
_RENDER_SIZE = 160  # icons are rendered larger, cropped to what is drawn, and then scaled down


def cache_dir() -> Path:
    """Folder for everything downloaded or rendered: `$LIBRA_CACHE`, or `~/.cache/libra`."""
    return Path(os.environ.get("LIBRA_CACHE") or Path.home() / ".cache" / "libra").expanduser()


def install_icons(cache: Path | None = None) -> Path:
    """
    Install the npm packages with the drawings and the emoji names, unless they are there already.

    Args:
        cache (`Path`, *optional*, defaults to [`cache_dir`]):
            The cache folder; packages go to `<cache>/npm`.

    Returns:
        `Path`: The `node_modules` folder.

    Raises:
        RuntimeError: If npm is not installed, or if it fails (its own message is shown).
    """
    prefix = (cache or cache_dir()) / "npm"
    modules = prefix / "node_modules"
    missing = [package for package in _NPM_PACKAGES if not (modules / package / "package.json").is_file()]
    if not missing:
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"The icons of the world come from npm packages ({', '.join(missing)}), and npm was not found. "
            "Install Node.js (which has npm) and try again."
        )
    print(f"Installing {', '.join(missing)} into {prefix} with npm (no install scripts are run)", flush=True)
    prefix.mkdir(parents=True, exist_ok=True)
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(prefix), *_NPM_PACKAGES]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"npm could not install the icons (exit code {result.returncode}):\n{result.stderr.strip()}")
    return modules


def _vendor_files(source: Path, vendor: str) -> tuple[Path, Path]:
    return source / "@iconify-json" / vendor / "icons.json", source / vendor / "icons.json"


def find_vendor_file(source: Path, vendor: str) -> Path:
    """
    The iconify JSON of one vendor.

    Args:
        source (`Path`): A `node_modules` folder, or any folder that holds `<vendor>/icons.json`.
        vendor (`str`): The vendor, for instance `"noto"`.

    Raises:
        FileNotFoundError: If the source has no such vendor.
    """
    candidates = _vendor_files(source, vendor)
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"No icons of {vendor!r}: looked for {candidates[0]} and {candidates[1]}.")


def present_vendors(source: Path) -> tuple[str, ...]:
    """
    The training vendors a folder of icons has.

    Raises:
        FileNotFoundError: If it has none.
    """
    found = tuple(v for v in TRAIN_VENDORS if any(path.is_file() for path in _vendor_files(source, v)))
    if not found:
        raise FileNotFoundError(f"{source} has icons of none of the vendors {', '.join(TRAIN_VENDORS)}.")
    return found


def icon_names(path: Path) -> set[str]:
    """All names in an iconify JSON, aliases too, without hyphens."""
    collection = json.loads(path.read_text(encoding="utf-8"))
    return {name.replace("-", "") for name in (*collection["icons"], *collection.get("aliases", {}))}


def resolve_icon(collection: dict, name: str) -> tuple[str, bool]:
    """
    The icon behind a name, following aliases. Hyphens do not matter: `"palmtree"` finds `"palm-tree"`.

    Args:
        collection (`dict`): The parsed `icons.json`.
        name (`str`): Name of an icon or of an alias of one, with or without its hyphens.

    Returns:
        `tuple[str, bool]`: The name of the icon as the collection spells it, and whether the alias mirrors it.

    Raises:
        KeyError: If the collection has neither an icon nor an alias of that name.
    """
    icons, aliases = collection["icons"], collection.get("aliases", {})
    flip = False
    while name not in icons:
        if name not in aliases:
            plain = name.replace("-", "")
            spelled = next((n for n in (*icons, *aliases) if n != name and n.replace("-", "") == plain), None)
            if spelled is None:
                raise KeyError(f"The collection {collection.get('prefix')!r} has no icon {name!r}.")
            name = spelled
            continue
        flip ^= aliases[name].get("hFlip", False)
        name = aliases[name]["parent"]
    return name, flip


def icon_svg(collection: dict, name: str) -> str:
    """
    One icon of an iconify collection as an SVG document.

    Args:
        collection (`dict`): The parsed `icons.json`.
        name (`str`): Name of an icon or of an alias of one (see [`resolve_icon`]).

    Raises:
        KeyError: If the collection has no icon of that name.
    """
    name, flip = resolve_icon(collection, name)
    icon = collection["icons"][name]
    left, top, width, height = (
        icon.get(key, collection.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = icon["body"]
    if flip:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def render_icon(svg: str, size: int = ICON_SIZE) -> np.ndarray:
    """
    Render an SVG, crop it to what is drawn, and centre that in a square.

    Vendors leave margins of different width around their drawings; after the crop an object's size in a scene means
    the same for all of them.

    Args:
        svg (`str`): The SVG document.
        size (`int`, *optional*, defaults to 96): Side of the result in pixels.

    Returns:
        `np.ndarray`: RGBA pixels of shape `(size, size, 4)`, uint8 in [0, 255], alpha not premultiplied.

    Raises:
        ValueError: If nothing is drawn.
    """
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=_RENDER_SIZE, height=_RENDER_SIZE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        raise ValueError("The icon is empty: no pixel of it is visible.")
    drawn = image.crop(box)
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class IconSet:
    """
    The rendered icons of one vendor.

    Args:
        vendor (`str`): The vendor.
        pixels (`dict[str, np.ndarray]`): RGBA pixels `(size, size, 4)`, uint8, by icon name.
    """

    vendor: str
    pixels: dict[str, np.ndarray]


def load_icons(vendor: str, names: Iterable[str], source: Path, cache: Path | None = None) -> IconSet:
    """
    Rendered icons of one vendor, from the cache if they were rendered before.

    Args:
        vendor (`str`): The vendor, for instance `"noto"`.
        names (`Iterable[str]`): Icon names; the result holds exactly these.
        source (`Path`): Folder with the iconify JSON files (see [`find_vendor_file`]).
        cache (`Path`, *optional*, defaults to [`cache_dir`]): Where rendered pixels are kept.

    Returns:
        [`IconSet`]: The icons at 96 x 96 pixels.

    Raises:
        FileNotFoundError: If the source has no such vendor.
        KeyError: If the vendor has no icon of one of the names.
    """
    names = sorted(set(names))
    if not names:
        return IconSet(vendor, {})
    text = find_vendor_file(source, vendor).read_text(encoding="utf-8")
    key = hashlib.sha256("\n".join([text, str(_RENDER_SIZE), str(ICON_SIZE), *names]).encode()).hexdigest()[:16]
    path = (cache or cache_dir()) / "icons" / f"{vendor}-{key}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return IconSet(vendor, dict(zip(arrays["names"].tolist(), arrays["pixels"])))
    collection = json.loads(text)
    documents = [icon_svg(collection, name) for name in names]
    print(f"Rendering {len(names)} icons of {vendor} into {path}", flush=True)
    pixels = np.stack([render_icon(document) for document in documents])  # (n, 96, 96, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npz")  # renamed when whole: others may read meanwhile
    np.savez(partial, names=np.array(names), pixels=pixels)
    os.replace(partial, path)
    return IconSet(vendor, dict(zip(names, pixels)))
