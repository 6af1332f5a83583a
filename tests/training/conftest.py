"""Fixtures of the tests of training: a small set of icons, so that no test needs npm."""

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder for rendered icons that all tests of a run share."""
    cache = tmp_path_factory.getbasetemp() / "libra-cache"
    monkeypatch.setenv("LIBRA_CACHE", str(cache))
    return cache


@pytest.fixture
def icons() -> Path:
    """Icons of the first eight concepts by two training vendors and the unseen one."""
    return DATA / "icons"


@pytest.fixture
def evaluation_folder() -> Path:
    """PNG images of all concepts, with labels."""
    return DATA / "eval"
