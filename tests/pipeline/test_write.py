"""Writing for several corpora at once: what one that is refused does to the others; no engine, no Ray."""

from pathlib import Path

import pytest

from pipeline.base_model import BaseModel
from pipeline.store import Stage
from pipeline.write import write
from tests.conftest import make_config


def test_a_corpus_whose_questions_are_refused_takes_no_general_answers_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one writes them for all."""
    monkeypatch.setattr("pipeline.stage.start_ray", lambda _: None)
    configs = [make_config(str(tmp_path / name), general={"prompts": 0, "held_out": 0}) for name in ("bad", "good")]
    for config in configs:
        chunk = Stage(config.run_dir, "chunk")
        chunk.open({})
        chunk.close(0.0)
    Stage(configs[0].run_dir, "question").open({"made": "otherwise"})
    bad, good = write(configs, BaseModel("m", "m", "r", "t", "c"))
    assert isinstance(bad, ValueError) and "other settings" in str(bad)
    assert not isinstance(good, ValueError)
    assert Stage(configs[1].run_dir, "general").require()
