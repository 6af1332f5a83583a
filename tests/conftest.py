"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference files made with the authors' release; LIBRA_GOLDEN says where it is."""
    path = Path(os.environ.get("LIBRA_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
    if not (path / "official_checkpoint" / "expected.json").is_file():
        pytest.fail(f"The reference files are not in {path}. Set LIBRA_GOLDEN to the folder that holds them.")
    return path
