"""Repositories on disk, made of the released tiny checkpoint."""

from pathlib import Path

import pytest

from libra_cli.convert import convert_release


@pytest.fixture(scope="session")
def release(golden) -> Path:
    """The authors' release in small: what `libra convert` reads."""
    return golden / "official_checkpoint" / "checkpoint"


@pytest.fixture(scope="session")
def repo(release, tmp_path_factory) -> Path:
    """The release converted to a repository of ours. Not to be changed by tests."""
    return convert_release(release, tmp_path_factory.mktemp("converted") / "libra-toy")
