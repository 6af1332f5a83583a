"""CPU and Apple's MPS: nothing asks for CUDA, and nothing computes in float64, which MPS does not have, on a device.

The code is read, not run: there is no MPS here. What may stay is listed with its reason.
"""

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("modeling_libra", "processing", "training", "libra_cli")

ALLOWED = {
    # behind torch.cuda.is_available()
    ("training/throughput.py", "torch.cuda.is_available"),
    ("training/throughput.py", "torch.cuda.max_memory_allocated"),
    # statistics of tensors that are on the CPU
    ("training/clip_evaluation.py", ".double"),
    ("training/clip_evaluation.py", "torch.float64"),
    ("training/reconstruction.py", ".double"),
}
"""Uses that are meant, by file and name."""


def uses(source: str) -> set[str]:
    """CUDA and float64, by name, and devices by literal."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("torch.cuda.") or name in ("torch.float64", "torch.double", "torch.complex128"):
                found.add(name)
            elif node.attr in ("cuda", "double") and name != "torch.cuda":
                found.add(f".{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] == "cuda":
            found.add(repr(node.value))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("model.cuda()", {".cuda"}),
        ("torch.cuda.synchronize()", {"torch.cuda.synchronize"}),
        ("x.to('cuda:1')", {"'cuda:1'"}),
        ("x.to(torch.float64)", {"torch.float64"}),
        ("torch.ones(2).double().sum()", {".double"}),
        ("x.to(y.device).float()", set()),
    ],
)
def test_what_is_found(source, expected):
    assert uses(source) == expected


def test_nothing_needs_cuda_or_float64():
    found = {
        (path.relative_to(REPOSITORY).as_posix(), name)
        for package in PACKAGES
        for path in sorted(Path(REPOSITORY, package).rglob("*.py"))
        for name in uses(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED
