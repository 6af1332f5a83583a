"""What the tests of conversion start from."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def release(golden) -> Path:
    """The authors' release in small: what `libra convert` reads."""
    return golden / "official_checkpoint" / "checkpoint"
