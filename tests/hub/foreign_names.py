"""Finds what our code uses of other libraries beyond their public names, by reading our source and our classes."""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PACKAGES = ("modeling_libra", "processing", "training", "libra_cli")
LIBRARIES = ("transformers", "trl", "peft", "accelerate")
OF_PYTHON = {"_", "_asdict", "_abc_impl"}
"""Of named tuples and abstract classes: Python's own, and documented or never written by us."""


def our_modules() -> Iterator[tuple[ModuleType, ast.Module]]:
    """All modules of our packages, imported and parsed."""
    for package in map(importlib.import_module, PACKAGES):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            yield module, ast.parse(Path(module.__file__).read_text(encoding="utf-8"))


def internal_imports() -> dict[str, set[str]]:
    """
    Names imported from a module inside of a library that the library's top level does not offer.

    Returns:
        `dict`: `module.name` -> our modules that import it.
    """
    found: dict[str, set[str]] = {}
    for module, tree in our_modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in LIBRARIES:
                library = importlib.import_module(node.module.split(".")[0])
                for alias in node.names:
                    if _is_private(alias.name) or not hasattr(library, alias.name):
                        found.setdefault(f"{node.module}.{alias.name}", set()).add(module.__name__)
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in LIBRARIES and "." in alias.name:
                        found.setdefault(alias.name, set()).add(module.__name__)
    return found


def private_names() -> dict[str, set[str]]:
    """
    Names with a leading underscore that belong to a library: attributes read or set on objects that are none of ours, and
    what our classes override.

    Returns:
        `dict`: name -> our modules that use it.
    """
    modules = list(our_modules())
    ours = {name for _, tree in modules for name in _defined_names(tree)}
    found: dict[str, set[str]] = {}
    for module, tree in modules:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in ours:
                found.setdefault(node.attr, set()).add(module.__name__)
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                for name in _overridden_names(cls):
                    found.setdefault(name, set()).add(module.__name__)
    return found


def _defined_names(tree: ast.Module) -> Iterator[str]:
    """Private names that our source defines: functions, class attributes and what is set on self."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and _is_private(node.name):
            yield node.name
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and _is_private(node.id):
            yield node.id
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_private(node.target.id):
            yield node.target.id
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_private(node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            yield from [node.attr] if owner in ("self", "cls") else []


def _overridden_names(cls: type) -> Iterator[str]:
    """Private names of a class of ours, or of a mixin of ours in it, that a base in a library has too."""
    bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
    for own in cls.__mro__:
        if own.__module__.split(".")[0] in PACKAGES:
            for name in vars(own):
                if _is_private(name) and any(name in vars(base) for base in bases):
                    yield name


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_PYTHON
