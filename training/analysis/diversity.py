"""Attention diversity of several models on drawings of emoji: the two curves of Figure 7.

    python -m training.analysis.diversity full=runs/ablations/full-seed0 no-bridge=runs/ablations/no-bridge-seed0 \
        no-expert=runs/ablations/no-expert-seed0 --concepts 20 --output diversity.png

Singles of the training vendors in new layouts, each concept in turn. All models are given the right caption as the answer,
so that they are compared on the same tokens. The numbers are written beside the figure, as JSON.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from libra_cli.loading import load_libra

from ..world.concepts import drawn_concepts, load_subjects
from ..world.icons import install_icons, present_vendors
from ..world.scenes import Scene, World, evaluation_images
from .attention import draw_curves, look_at_image
from .looks import label_models
from .panels import Curve, check_output, save_figure

MEASURES = ("cross_layer", "inner_layer")


def diversity_scenes(icons: Path, samples: int, num_concepts: int | None = None) -> list[Scene]:
    """
    The images: singles of the training vendors in layouts that nothing was trained on.

    Args:
        icons (`Path`): folder with iconify JSON files.
        samples (`int`): how many.
        num_concepts (`int`, *optional*): of only so many first concepts, for models that know no more.

    Returns:
        `list` of [`Scene`]: the same at every call.
    """
    vendors = present_vendors(icons)
    concepts = drawn_concepts(icons, vendors)[:num_concepts]
    return evaluation_images(World(load_subjects(concepts, vendors, icons), "validation", 1), samples)


def measure_diversity(model: Any, processor: Any, scenes: Sequence[Scene]) -> dict[str, Any]:
    """
    Both differences, and how much of the attention is on the image at all.

    Args:
        model ([`LibraForCausalLM`]), processor ([`LibraProcessor`]): of one repository.
        scenes (`Sequence` of [`Scene`]): images with captions; at least two.

    Returns:
        `dict`: `samples`; `cross_layer` (layers - 1 numbers), `inner_layer` and `on_image` (a number a layer), each a
        `dict` with the `mean` over the images and the `half_width` of its 95% interval.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*MEASURES, "on_image")}
    for scene in scenes:
        look = look_at_image(model, processor, scene.image, answer=scene.caption)
        found["cross_layer"].append(look.cross_layer)
        found["inner_layer"].append(look.inner_layer)
        found["on_image"].append(look.maps.sum(dim=-1).mean(dim=(0, 2)))
    return {"samples": len(scenes)} | {name: _mean(torch.stack(rows)) for name, rows in found.items()}


def _mean(rows: torch.Tensor) -> dict[str, list[float]]:
    half_width = 1.96 * rows.std(dim=0) / math.sqrt(len(rows))
    return {"mean": rows.mean(dim=0).tolist(), "half_width": half_width.tolist()}


def draw_diversity(results: dict[str, dict[str, Any]], path: str | Path, title: str = "") -> None:
    """
    Draws the two curves of several models, with 95% intervals.

    Args:
        results (`dict`): by the models' labels, as [`measure_diversity`] gives them.
        path (`str` or `Path`): the PNG or SVG file to write.
        title (`str`, *optional*, defaults to `""`): above them.
    """
    figure = Figure(figsize=(7.6, 3.2), dpi=110, layout="constrained")
    curves = [
        [Curve(label, of[name]["mean"], of[name]["half_width"]) for label, of in results.items()] for name in MEASURES
    ]
    draw_curves(figure, *curves)
    figure.suptitle(title, fontsize="small")
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Measures and draws; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(description="Draws the attention diversity of models on drawings of emoji.")
    parser.add_argument("models", nargs="+", metavar="LABEL=MODEL", help="folder or Hub id, and its name in the figure")
    parser.add_argument("--samples", type=int, default=100, help="images (default: %(default)s)")
    parser.add_argument("--concepts", type=int, help="of the first so many concepts (default: all)")
    parser.add_argument("--icons", type=Path, help="folder with iconify JSON files (default: installed with npm)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.png", help="or FILE.svg; the numbers: .json"
    )
    options = parser.parse_args(arguments)
    try:
        if options.samples < 2:
            raise ValueError(f"--samples is {options.samples}; a mean with an interval needs at least 2.")
        check_output(options.output)
        models = label_models(options.models)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    scenes = diversity_scenes(options.icons or install_icons(), options.samples, options.concepts)
    results = {}
    for label, path in models.items():
        results[label] = measure_diversity(*load_libra(path), scenes)
        for name in (*MEASURES, "on_image"):
            print(f"{label}: {name} " + " ".join(f"{value:.3f}" for value in results[label][name]["mean"]), flush=True)
    draw_diversity(results, options.output, f"answers about {len(scenes)} images; bars: 95% intervals of the mean")
    numbers = options.output.with_suffix(".json")
    numbers.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {options.output} and {numbers}")


if __name__ == "__main__":
    main()
