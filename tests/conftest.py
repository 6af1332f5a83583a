"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from libra_cli.convert import convert_release
from modeling_libra import LibraConfig, LibraForCausalLM
from tests.modeling.toys import make_config, make_model

# Tests are not about time: on a busy machine drawing examples is slow, and that is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference files made with the authors' release; LIBRA_GOLDEN says where it is."""
    path = Path(os.environ.get("LIBRA_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
    if not (path / "official_checkpoint" / "expected.json").is_file():
        pytest.fail(f"The reference files are not in {path}. Set LIBRA_GOLDEN to the folder that holds them.")
    return path


@pytest.fixture(scope="session")
def repo(golden, tmp_path_factory) -> Path:
    """The authors' release in small, converted to a repository of ours. Not to be changed by tests."""
    return convert_release(golden / "official_checkpoint" / "checkpoint", tmp_path_factory.mktemp("repo") / "libra-toy")


@pytest.fixture
def toy_config() -> LibraConfig:
    """The configuration of a model small enough to check by hand."""
    return make_config()


@pytest.fixture
def toy_model(toy_config) -> LibraForCausalLM:
    """A random model of `toy_config` in evaluation mode, with no parameter zero."""
    return make_model(toy_config)
