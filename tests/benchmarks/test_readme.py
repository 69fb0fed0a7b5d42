"""The README says what the result files say, and every result file says where it was measured."""

import json
from pathlib import Path

import pytest

from benchmarks.readme import README, with_table
from benchmarks.record import ROOT, describe_run
from tests.conftest import make_config


def test_the_readme_shows_the_recorded_figures() -> None:
    readme = README.read_text(encoding="utf-8")
    assert with_table(readme) == readme, "run: python -m benchmarks.readme"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_result_names_its_hardware_its_versions_and_its_claims(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["device"] and result["versions"] and result["commit"] and result["date"]
    for claim in result["claims"]:
        assert set(claim) == {"name", "value", "aim", "met"}


def test_a_result_names_the_run_that_it_went_on_from_without_its_folder() -> None:
    described = describe_run(make_config("/home/a/runs/after", update={"previous_run": "/home/a/runs/before"}))
    assert described["settings"]["update"]["previous_run"] == "before"
    assert "/home" not in json.dumps(described)
