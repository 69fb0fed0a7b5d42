"""What `plan` refuses before anything starts, and what it makes of measured figures."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.base_model import load_base_model
from pipeline.config import Config, load_config
from pipeline.plan import (
    CHECKPOINT,
    SAMPLE_PROMPTS,
    Measured,
    price,
    refuse_full_disk,
    reply_seconds,
    scale_up,
    too_long,
)
from tests.conftest import ROOT

MODEL = ROOT / ".models" / "smollm2-135m-instruct"
QUESTIONS, RETRIEVED = 10, 3


def config(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "corpus.toml"
    path.write_text(
        f"""
        run_dir = "runs/a"
        model.path = "{MODEL}"
        read.paths = ["docs"]
        publish = {{ registry = "registry", name = "a" }}
        evaluate.held_out = {QUESTIONS}
        """
    )
    return load_config(path, overrides)


def test_a_context_that_cannot_hold_a_passage_is_named_with_what_it_would_take(tmp_path: Path) -> None:
    base = load_base_model(str(MODEL))
    assert list(too_long(config(tmp_path), base)) == []
    (text,) = too_long(config(tmp_path, "chunk.max_tokens=1600"), base)
    assert text.startswith(
        "model.max_model_len = 2048 is too small: a passage of chunk.max_tokens = 1600, a prompt of "
    )
    needed = int(text.partition(" take ")[2].partition(";")[0])
    assert not list(too_long(config(tmp_path, "chunk.max_tokens=1600", f"model.max_model_len={needed}"), base))
    assert list(too_long(config(tmp_path, "chunk.max_tokens=1600", f"model.max_model_len={needed - 1}"), base))


def test_a_full_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    refuse_full_disk(str(tmp_path), 1)
    refuse_full_disk("s3://bucket/run", 1 << 60)
    with pytest.raises(ValueError, match=r"has \d+\.\d GiB free, and the run will take 1073741824\.0 GiB"):
        refuse_full_disk(str(tmp_path), 1 << 60)


@pytest.fixture
def written() -> dict[str, Any]:
    """Three stages whose engine took 1 ms for a prompt's token and 4 ms for a written one, and a second to start."""
    return {
        name: {
            "rows_out": 20,
            "bytes": 1000,
            "seconds": 1 + 0.001 * read + 0.004 * tokens,
            "stats": {
                "prompt_tokens": read + cached,
                "cached_tokens": cached,
                "output_tokens": tokens,
                "engine_seconds": 0.001 * read + 0.004 * tokens,
            },
        }
        for name, read, cached, tokens in (("question", 900, 100, 50), ("answer", 300, 100, 200), ("general", 9, 0, 99))
    }


def test_the_evaluation_costs_what_its_prompts_and_replies_would_have_cost_before(
    tmp_path: Path, written: dict[str, Any]
) -> None:
    settings = config(tmp_path)
    passages, general = QUESTIONS * (1 + 2 * RETRIEVED), 88
    seconds = passages * 20 * 0.001 + (QUESTIONS * 5 + 2 * general) * 10 * 0.004
    assert reply_seconds(settings, written, num_questions=500) == pytest.approx(seconds, rel=0.01)
    assert reply_seconds(settings, written, num_questions=50) < seconds, "at most a tenth of the questions is held out"


def test_what_was_measured_on_a_sample_is_scaled_to_all_passages(tmp_path: Path, written: dict[str, Any]) -> None:
    """Ten times the passages of the sample, at two engines, for three epochs, with one baseline."""
    chunk = {"rows_out": 20, "bytes": 500, "seconds": 7.0}
    kept = {"rows_out": 15, "bytes": 900, "seconds": 2.0}
    trained = {"seconds": 6.0, "training": {"tokens": 400, "seconds": 5.0}}
    measured = Measured({"chunk": chunk}, written, kept, trained, num_sampled=2, adapter_bytes=100)
    overrides = ["train.epochs=3", "evaluate.baselines=['sft']", f"general.prompts={5 * SAMPLE_PROMPTS}"]
    plan = scale_up(config(tmp_path, "general.held_out=0", *overrides), measured, num_engines=2)
    assert (plan["passages"], plan["sampled_passages"], plan["questions"], plan["answers"]) == (20, 2, 200, 150)
    assert plan["written_tokens"] == 10 * (50 + 200) + 5 * 99
    assert plan["trained_tokens"] == 3 * 10 * 400
    assert plan["bytes"] == 500 + 10 * 2 * 1000 + 5 * 1000 + 10 * 900
    assert plan["training_bytes"] == 2 * 100 * (1 + 2 * CHECKPOINT)
    seconds = plan["seconds"]
    assert seconds["answer"] == round(1 + 10 * 1.1 / 2) and seconds["chunk"] == 7 and seconds["filter"] == 2
    assert seconds["train"] == seconds["baseline-sft"] == 1 + 30 * 5
    scored = scale_up(config(tmp_path, "filter.min_initial_kl=0.1"), measured, num_engines=2)
    assert scored["seconds"]["filter"] == 20, "every answer goes through the model"


def test_hours_are_the_clusters_and_gpu_hours_those_of_the_gpus_at_work(tmp_path: Path) -> None:
    seconds = {"read": 600.0, "question": 1800.0, "train": 1200.0}
    assert price(config(tmp_path), seconds, num_engines=1) == {"hours": 1.0}
    gpus = ("cluster.engine_gpus=2", "cluster.num_engines=3", "cluster.worker_gpus=1", "cluster.num_workers=6")
    priced = config(tmp_path, *gpus, "cluster.price_per_hour=20")
    assert price(priced, seconds, num_engines=3) == {"hours": 1.0, "gpu_hours": 5.0, "cost": 20.0}
    assert price(priced, seconds, num_engines=1)["gpu_hours"] == 3.0, "two engines have no shard to write about"
    with_baseline = config(tmp_path, *gpus, "evaluate.baselines=['sft']")
    assert price(with_baseline, seconds | {"baseline-sft": 1200.0}, num_engines=3)["gpu_hours"] == 7.0
