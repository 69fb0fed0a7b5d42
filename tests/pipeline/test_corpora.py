"""Many corpora in one file: settings of their own for each, and one that fails stops no other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Config, load_config, load_configs
from tests.conftest import ROOT


def write_config(folder: Path, run_dir: str = "runs/{corpus}", name: str = "{corpus}") -> Path:
    for corpus in ("bakery", "mill"):
        (folder / "corpora" / corpus).mkdir(parents=True, exist_ok=True)
    config = folder / "corpora.toml"
    config.write_text(
        f"""
        run_dir = "{run_dir}"
        corpora = "{folder}/corpora"
        model.path = "models/base"
        read.paths = ["{folder}/corpora/{{corpus}}/docs", "common"]
        publish = {{ registry = "registry", name = "{name}" }}
        """
    )
    return config


def test_the_name_of_each_folder_stands_in_its_settings(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    configs = load_configs(path, ["chunk.max_tokens=99"])
    assert list(configs) == ["bakery", "mill"]
    mill = configs["mill"]
    assert isinstance(mill, Config)
    assert mill.run_dir.endswith("/runs/mill") and mill.publish.name == "mill" and mill.chunk.max_tokens == 99
    assert mill.read.paths == [f"{tmp_path}/corpora/mill/docs", "common"]
    assert load_config(path) == load_configs(path)["bakery"]


@pytest.mark.parametrize("shared", [{"run_dir": "runs/all"}, {"name": "all"}])
def test_corpora_do_not_share_a_run_or_an_adapter(tmp_path: Path, shared: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"must hold \{corpus\}"):
        load_configs(write_config(tmp_path, **shared))


def test_corpora_share_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"may not stand in \[model\]"):
        load_configs(write_config(tmp_path), ["model.path=models/{corpus}"])


def test_a_folder_whose_name_cannot_be_used_stops_no_other(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    for name in ("Acme Corp", "auto"):
        (tmp_path / "corpora" / name).mkdir()
    configs = load_configs(path)
    assert "publish.name = 'Acme Corp'" in str(configs["Acme Corp"]) and "any adapter" in str(configs["auto"])
    assert load_config(path) == configs["bakery"] and isinstance(configs["mill"], Config)
    with pytest.raises(ValueError, match="many"):
        load_configs(path, ["chunk.max_tokens=many"])


def test_hidden_folders_are_no_corpora(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    (tmp_path / "corpora" / ".ipynb_checkpoints").mkdir()
    assert list(load_configs(path)) == ["bakery", "mill"]


def test_a_folder_without_corpora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpora = .* has no folders"):
        load_configs(write_config(tmp_path), [f"corpora={tmp_path}/corpora/mill"])


@pytest.mark.long
def test_one_job_makes_an_adapter_for_each_corpus_but_the_broken_one() -> None:
    command = [sys.executable, "-m", "benchmarks.corpora", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    claims = json.loads(done.stdout.splitlines()[-1])["claims"]
    assert all(claim["met"] for claim in claims), claims
