"""What a benchmark prints and writes: the figures, and the machine they were measured on."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from .figures import Figure, measure_figures
from .settings import BenchSettings


def run_benchmark(
    settings: BenchSettings, names: Sequence[str] | None = None, json_path: str | Path | None = None
) -> str:
    """
    Measures, and writes what was measured.

    Args:
        settings ([`BenchSettings`]): sizes and repetitions.
        names (`Sequence` of `str`, *optional*): which figures; all of them when absent.
        json_path (`str` or `Path`, *optional*): a file for all measurements; replaced if it exists.

    Returns:
        `str`: the table, in Markdown, under two lines about machine and settings.

    Raises:
        ValueError: for an unknown figure, or a file whose folder does not exist; before anything is measured.
    """
    if json_path is not None and (Path(json_path).is_dir() or not Path(json_path).parent.is_dir()):
        raise ValueError(f"{json_path} cannot be written: it must be a file in a folder that exists.")
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "settings": {**settings.to_dict(), "dtype": "float32", "attention": "sdpa", "batch": 1},
    }
    figures = measure_figures(settings, names)
    report["figures"] = [figure_to_dict(figure) for figure in figures]
    if json_path is not None:
        Path(json_path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return format_heading(report) + "\n\n" + format_table(figures)


def describe_machine() -> dict[str, Any]:
    """CPU model, its cores and the machine's RAM in bytes (None where the system does not say), and the system."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "ram_bytes": ram, "system": platform.platform(terse=True)}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def describe_versions() -> dict[str, str]:
    """Versions of what runs."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def figure_to_dict(figure: Figure) -> dict[str, Any]:
    """A figure as plain values, for JSON: medians and ratio of the better run, and all measurements."""
    best = figure.best
    return {
        "name": figure.name,
        "title": figure.title,
        "baseline_name": figure.baseline,
        "unit": figure.unit,
        "ours": median(best.ours),
        "baseline": median(best.baseline),
        "ratio": figure.ratio,
        "floor": figure.floor,
        "bar": figure.bar,
        "runs": [{"ours": list(run.ours), "baseline": list(run.baseline), "ratio": run.ratio} for run in figure.runs],
        "details": figure.details,
    }


def format_heading(report: dict[str, Any]) -> str:
    """Two lines: machine and versions, settings."""
    machine, versions, settings = report["machine"], report["versions"], report["settings"]
    ram = f", {machine['ram_bytes'] / 2**30:.0f} GiB" if machine["ram_bytes"] else ""
    return (
        f"{report['date'][:10]}, {machine['cpu']}, {machine['cores']} cores{ram}, Python {versions['python']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}.\n"
        f"{settings['threads']} threads, {settings['dtype']}, {settings['attention']}, batch {settings['batch']}, "
        f"V {settings['vocab_size']}, {settings['num_heads']} heads, images of {settings['image_grid'] ** 2 + 2} tokens; "
        f"medians of {settings['pairs']} pairs, the better of {settings['runs']} runs."
    )


def format_table(figures: Sequence[Figure]) -> str:
    """
    Args:
        figures (`Sequence` of [`Figure`]): what was measured.

    Returns:
        `str`: a Markdown table, and notes under it where a figure has some.
    """
    lines = ["| figure | Libra | against | | ratio | counted floor | bar |", "|---|---|---|---|---|---|---|"]
    for figure in figures:
        ours, baseline = (_format(median(side), figure.unit) for side in (figure.best.ours, figure.best.baseline))
        bar = "" if figure.bar is None else f"{figure.bar:g}"
        if figure.bar is not None and figure.ratio > figure.bar:
            bar += " (missed)"
        lines.append(
            f"| {figure.title} | {ours} | {figure.baseline} | {baseline} | {figure.ratio:.3f} | {figure.floor:.3f} "
            f"| {bar} |"
        )
    notes = _notes({figure.name: figure for figure in figures})
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _format(value: float, unit: str) -> str:
    return f"{value * 1000:.1f} ms" if unit == "seconds" else f"{value / 2**20:.1f} MiB"


def _notes(figures: dict[str, Figure]) -> list[str]:
    notes = []
    if "memory" in figures and figures["memory"].details["resident"]["ratio"] is not None:
        resident = figures["memory"].details["resident"]
        ours, baseline = (_format(resident[side], "bytes") for side in ("ours", "baseline"))
        notes.append(
            f"Peak memory counts live tensors; in resident pages: {ours} / {baseline} = {resident['ratio']:.3f}."
        )
    naive = [
        f"{name.removeprefix('naive-')} {1 / figure.ratio:.2f}" for name, figure in figures.items() if "naive" in name
    ]
    if naive:
        notes.append(f"The naive form over Libra: {', '.join(naive)}.")
    return notes
