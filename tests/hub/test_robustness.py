"""Everything in `robustness.py` is done, and the user is told what the table says."""

import pytest

from tests.hub.robustness import CASES, TABLE, Case, table


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.entry}: {case.damage}".replace("/", " "))
def test_what_is_said(case: Case, repo, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert case.told in case.run(repo, tmp_path)


def test_the_table_is_current():
    assert TABLE.read_text(encoding="utf-8").endswith("\n\n" + table())
