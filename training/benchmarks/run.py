"""Benchmarks through lmms-eval, as `libra evaluate --tasks libra_gqa libra_pope ...` calls it.

`OUTPUT/answers.jsonl` keeps every answer as it comes: the same command goes on where a run was stopped.
`OUTPUT/results.json` and `OUTPUT/results.md` are the numbers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TASKS = Path(__file__).with_name("tasks")
"""Our tasks: the benchmarks of the paper's Table 5 with the prompts of its Table 6."""

JUDGED = "libra_mmvet"
ANSWERS, RESULTS, TABLE = "answers.jsonl", "results.json", "results.md"


def our_tasks() -> list[str]:
    """Names of the tasks in [`TASKS`]."""
    return sorted(f"libra_{file.stem}" for file in TASKS.glob("*.yaml"))


def run_benchmarks(
    model: str | Path,
    tasks: Sequence[str],
    output: str | Path,
    limit: int | None = None,
    batch_size: int = 8,
    beside: str | Path | None = None,
    include: str | Path | None = None,
) -> dict[str, Any]:
    """
    Measures a Libra on tasks of lmms-eval, prints the table and writes both.

    Args:
        model (`str` or `Path`): folder or Hub repo.
        tasks (`Sequence` of `str`): of [`our_tasks`], or any of lmms-eval's that generate text from images.
        output (`str` or `Path`): folder for answers and numbers; made if it is not there.
        limit (`int`, *optional*): samples of each task; by default all.
        batch_size (`int`, *optional*, defaults to 8): samples at a time.
        beside (`str` or `Path`, *optional*): JSON file with numbers to set beside, such as those of a paper or the
            `results.json` of another model: `{"libra_gqa": {"exact_match": 61.0}}`.
        include (`str` or `Path`, *optional*): folder with further task files.

    Returns:
        `dict`: what `results.json` has: `model`, `date`, `lmms_eval`, `limit`, `samples` (by task) and `results`: by task,
        the numbers by name.

    Raises:
        ValueError: for tasks there are not, packages that are missing, or answers of another model in the folder; before
            the model is loaded.
    """
    if find_spec("lmms_eval") is None:
        raise ValueError("Benchmarks need lmms-eval, which is not installed. Run: pip install 'libra-vlm[benchmarks]'")
    if JUDGED in tasks and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(f"{JUDGED} is judged by a GPT; set OPENAI_API_KEY (and MODEL_VERSION for another judge).")
    other = read_numbers(beside) if beside else {}
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from .lmms_model import LibraLmms

    folders = [str(TASKS), *([str(include)] if include else [])]
    manager = TaskManager(include_path=folders, include_defaults=False, model_name="libra")
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown and not any(name.startswith("libra_") for name in unknown):  # only then: lmms-eval reads 1500 files
        manager = TaskManager(include_path=folders, model_name="libra")
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"There is no task {', '.join(unknown)}. There are emoji, {', '.join(our_tasks())}, and those of lmms-eval."
        )
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    libra = LibraLmms(model, batch_size=batch_size, answers=output / ANSWERS)
    found = simple_evaluate(
        model=libra,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        log_samples=False,
        bootstrap_iters=0,
        process_docs_parallel=1,
    )
    report = {
        "model": str(model),
        "date": date.today().isoformat(),
        "lmms_eval": version("lmms_eval"),
        "limit": limit,
        "samples": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "results": plain_results(found["results"]),
    }
    table = format_table(report, other, Path(beside).stem if beside else None)
    (output / RESULTS).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / TABLE).write_text(table + "\n", encoding="utf-8")
    print(table)
    return report


def plain_results(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """
    The numbers of lmms-eval without what is not a number, and without the names of filters (`"f1,none"`).

    Args:
        results (`Mapping`): `results` of `simple_evaluate`.

    Returns:
        `dict`: by task, numbers by name.
    """
    return {
        task: {
            name.partition(",")[0]: float(value)
            for name, value in numbers.items()
            if isinstance(value, (int, float)) and "stderr" not in name and "," in name
        }
        for task, numbers in results.items()
    }


def read_numbers(file: str | Path) -> dict[str, dict[str, float]]:
    """
    Numbers to set beside others.

    Args:
        file (`str` or `Path`): JSON: by task, numbers by name; or a `results.json`.

    Raises:
        ValueError: if it is neither.
        OSError: if it cannot be read.
    """
    try:
        numbers = json.loads(Path(file).read_text(encoding="utf-8"))
        numbers = numbers.get("results", numbers)
        return {task: {name: float(value) for name, value in of.items()} for task, of in numbers.items()}
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'{file} must be JSON such as {{"libra_gqa": {{"exact_match": 61.0}}}}: {error}') from error


def format_table(
    report: Mapping[str, Any], other: Mapping[str, Mapping[str, float]] | None = None, name: str | None = None
) -> str:
    """
    The numbers as a Markdown table.

    Args:
        report (`Mapping`): of [`run_benchmarks`].
        other (`Mapping`, *optional*): numbers to set beside, by task and name.
        name (`str`, *optional*): what the column of these is called.

    Returns:
        `str`: a row a number; a dash where there is none to set beside.
    """
    head = ["task", "metric", "samples", Path(report["model"]).name, *([name] if name else [])]
    rows = [head, ["---"] * len(head)]
    for task, numbers in report["results"].items():
        for metric, value in numbers.items():
            row = [task, metric, str(report["samples"].get(task, "")), f"{value:.4g}"]
            if name:
                beside = (other or {}).get(task, {}).get(metric)
                row.append("-" if beside is None else f"{beside:.4g}")
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
