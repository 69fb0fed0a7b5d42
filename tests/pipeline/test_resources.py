"""What a run asks of a cluster, and what is said where the cluster has not got it."""

import shlex
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from ray.job_submission import JobStatus

from benchmarks.raylets import ENGINE, local_cluster, until
from cluster.__main__ import main
from cluster.submit import connect, refuse_relative_paths, submit
from pipeline.config import Config, read_settings
from pipeline.resources import (
    compute_dtype,
    demands,
    engine_options,
    has_labels,
    loaded_bytes,
    model_fits,
    refuse_small_machine,
    unmet,
    worker_options,
)
from pipeline.store import Stage
from tests.conftest import ROOT

GIB = 1 << 30
MODEL = ROOT / ".models" / "smollm2-135m-instruct"


def config(**cluster: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": "/runs/a",
            "model": {"path": "/models/base"},
            "read": {"paths": ["/docs"]},
            "publish": {"registry": "/registry", "name": "a"},
            "cluster": cluster,
        }
    )


def missing(nodes: list[dict[str, float]], labels: list[dict[str, str]] | None = None, **cluster: Any) -> list[str]:
    seen = [
        {"Resources": resources, "Labels": labels[number] if labels else {}} for number, resources in enumerate(nodes)
    ]
    return [text for demand in demands(config(**cluster)) if (text := unmet(demand, seen))]


def test_a_laptop_is_enough_for_the_defaults() -> None:
    assert missing([{"CPU": 2}]) == []


def test_engines_may_be_fewer_and_workers_may_not() -> None:
    nodes = [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}]
    assert missing(nodes, num_engines=16, engine_gpus=1, num_workers=2, worker_gpus=1) == []
    (text,) = missing(nodes, num_engines=16, engine_gpus=1, num_workers=3, worker_gpus=1)
    assert "stage train needs 3 x (2 CPU cores and 1 GPUs)" in text and "room for 2" in text
    assert "cluster.num_workers" in text


def test_no_gpu_where_one_is_asked_for() -> None:
    (text,) = missing([{"CPU": 64}], engine_gpus=1)
    assert "stage write" in text and "the largest node has 64 CPU cores, 0 GPUs" in text


def test_tensor_parallelism_stays_on_a_node() -> None:
    nodes = [{"CPU": 32, "GPU": 4}] * 4
    assert missing(nodes, engine_gpus=4) == []
    (text,) = missing(nodes, engine_gpus=8)
    assert "8 GPUs" in text and "cluster.num_engines, engine_gpus" in text


def test_no_nodes_at_all() -> None:
    assert len(missing([])) == 2


def test_engines_and_workers_stay_on_the_nodes_with_their_labels() -> None:
    nodes = [{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}]
    labels = [{"gpu": "L40S", "market": "spot"}, {"gpu": "H100"}]
    apart = {"engine_gpus": 1, "engine_labels": {"gpu": "L40S"}, "worker_gpus": 1, "worker_labels": {"gpu": "H100"}}
    assert missing(nodes, labels, **apart, num_workers=4) == []
    (text,) = missing(nodes, labels, **apart, num_workers=5)
    assert "each on one node with gpu = 'H100'; there is room for 4" in text and "worker_labels" in text
    (text,) = missing(nodes, labels, **apart | {"engine_labels": {"gpu": "B200"}})
    assert "stage write needs nodes with gpu = 'B200', and none of the 2 nodes is one" in text
    assert "engine_labels" in text


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("spot", True),
        ("!spot", False),
        ("in(spot, on-demand)", True),
        ("!in(on-demand,none)", True),
        ("in(a,b)", False),
    ],
)
def test_selectors_mean_what_they_mean_to_ray(selector: str, matches: bool) -> None:
    assert has_labels({"market": "spot"}, {"market": selector}) is matches
    assert has_labels({}, {"market": selector}) is selector.startswith("!")


@pytest.mark.parametrize("selector", ["", "in()", "-a", "in(a", "!!a", "a b"])
def test_a_selector_that_ray_would_not_take_stops_at_the_door(selector: str) -> None:
    with pytest.raises(ValueError, match="engine_labels"):
        config(engine_labels={"gpu": selector})


@pytest.mark.long
def test_an_engine_runs_where_its_labels_are(tmp_path: Path) -> None:
    """Two nodes with room, one with the label; the base model writes two general prompts."""
    path = tmp_path / "corpus.toml"
    path.write_text(
        f"""
        run_dir = "{tmp_path}/run"
        model.path = "{ROOT}/.models/smollm2-135m-instruct"
        read.paths = ["unused"]
        publish = {{ registry = "{tmp_path}/registry", name = "test" }}
        general = {{ prompts = 2, held_out = 0, max_tokens = 16 }}
        cluster = {{ kv_cache_gb = 1, engine_labels = {{ pool = "in(write, none)", absent = "!x" }} }}
        """
    )
    passages = Stage(f"{tmp_path}/run", "chunk")
    passages.open({})
    passages.close(0)
    with local_cluster([2]) as cluster:
        cluster.add_node(2, "--labels=pool=write")
        head, other = until(lambda: len(nodes := cluster.nodes()) == 2 and nodes)

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            line = [sys.executable, "-m", *command]
            return subprocess.run(line, cwd=ROOT, env=cluster.environment, capture_output=True, text=True)

        written = run("pipeline", "general", str(path))
        assert written.returncode == 0, written.stderr[-4000:]
        assert cluster.actor_nodes(ENGINE) == {other} != {head}
        wrong = run("cluster", "check", str(path), "cluster.worker_labels.pool=train", "--address", cluster.address)
        assert wrong.returncode == 2
        assert "missing: stage train needs nodes with pool = 'train', and none of the 2 nodes is one" in wrong.stderr


def test_a_machine_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def refuse(**cluster: Any) -> None:
        refuse_small_machine(config(**cluster).cluster, demands(config(**cluster)))

    refuse(engine_cpus=1000, worker_cpus=1000)
    with pytest.raises(ValueError, match=r"stage write needs 1 x \(2 CPU cores and 999 GPUs\)"):
        refuse(engine_gpus=999)
    with pytest.raises(ValueError, match="stage train needs 1000 x"):
        refuse(num_workers=1000)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    refuse(engine_gpus=999, num_workers=1000)


def test_models_are_in_bf16_where_the_processor_has_instructions_for_its_products() -> None:
    assert compute_dtype(on_gpu=True) == "bfloat16"
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat")))
    has_instructions = {"avx512bw", "avx512vl", "avx512dq"} <= set(flags.split()) or "bf16" in flags.split()
    assert compute_dtype(on_gpu=False) == ("bfloat16" if has_instructions else "float32")


def test_weights_take_twice_the_memory_where_bf16_is_loaded_as_float32() -> None:
    size = (MODEL / "model.safetensors").stat().st_size
    assert loaded_bytes(str(MODEL), "bfloat16") == size
    assert loaded_bytes(str(MODEL), "float32") == 2 * size


def test_a_model_that_does_not_fit() -> None:
    assert model_fits(config(engine_gpus=1), 14 * GIB, 24 * GIB) is None
    text = model_fits(config(engine_gpus=2), 140 * GIB, 80 * GIB)
    assert text and "140.0 GiB" in text and "set cluster.engine_gpus to 3 or more" in text
    assert model_fits(config(engine_gpus=3), 140 * GIB, 80 * GIB) is None
    text = model_fits(config(engine_gpus=3, worker_gpus=1), 140 * GIB, 80 * GIB)
    assert text and "a training worker, which loads all of them" in text
    assert model_fits(config(engine_gpus=1, worker_gpus=1), 14 * GIB, 24 * GIB) is None
    assert model_fits(config(), 140 * GIB, 0) is None, "the CPU build needs no GPU"
    assert model_fits(config(), 14 * GIB, 0, memory_bytes=16 * GIB) is None
    text = model_fits(config(kv_cache_gb=4), 14 * GIB, 0, memory_bytes=16 * GIB)
    assert text and "too much with cluster.kv_cache_gb = 4 for 16.0 GiB of memory" in text


GOOD = """
run_dir = "s3://bucket/run"
[model]
path = "/models/a"
[read]
paths = ["s3://bucket/docs", "~/docs"]
[publish]
registry = "s3://bucket/registry"
"""


@pytest.mark.parametrize("inside", [None, "runs"])
def test_a_config_that_would_stay_behind_is_refused(tmp_path: Path, inside: str | None) -> None:
    config = (ROOT / inside if inside else tmp_path) / "corpus.toml"
    with pytest.raises(ValueError, match="does not travel to the cluster"):
        submit(str(config), [], [], None)


def test_a_cluster_that_wants_a_token_says_how_to_give_it() -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match="RAY_AUTH_MODE=token"):
            connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_paths_must_mean_the_same_on_every_node() -> None:
    refuse_relative_paths(tomllib.loads(GOOD))
    for field, text in {
        "run_dir": GOOD.replace("s3://bucket/run", "runs/a"),
        "model.path": GOOD.replace("/models/a", "models/a"),
        "read.paths": GOOD.replace("s3://bucket/docs", "docs"),
        "publish.registry": GOOD.replace("s3://bucket/registry", "./registry"),
    }.items():
        with pytest.raises(ValueError, match=f"{field} = .* is relative"):
            refuse_relative_paths(tomllib.loads(text))


def test_overrides_count_among_the_paths_of_a_job(tmp_path: Path) -> None:
    config = tmp_path / "corpus.toml"
    config.write_text(GOOD)
    refuse_relative_paths(read_settings(config, ['read.paths=["/data/docs", "s3://bucket/faq"]']))
    for override in ("run_dir=here", 'read.paths=["s3://bucket/faq", "docs"]', "update.previous_run=runs/a"):
        with pytest.raises(ValueError, match="is relative"):
            refuse_relative_paths(read_settings(config, [override]))


def test_a_job_for_corpora_that_only_the_nodes_have_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "corpus.toml"
    config.write_text(GOOD.replace("s3://bucket/run", "s3://bucket/{corpus}") + 'name = "{corpus}"\n')
    submitted = []
    monkeypatch.setattr("cluster.submit.submit", lambda *arguments: submitted.append(arguments) or 0)
    assert main(["submit", str(config), "corpora=/only/there"]) == 0
    assert len(submitted) == 1


@pytest.mark.parametrize(("interrupted", "code"), [(False, 0), (True, 130)])
def test_a_job_gets_the_arguments_and_outlives_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool, code: int
) -> None:
    config = tmp_path / "corpus.toml"
    config.write_text(GOOD + 'name = "b"\n')
    client = Mock()
    client.submit_job.return_value = "job-1"
    client.get_job_info.return_value.status = JobStatus.SUCCEEDED
    earlier = [(status, {"run_dir": "s3://bucket/run"}) for status in (JobStatus.STOPPED, JobStatus.FAILED)]
    earlier += [(JobStatus.RUNNING, {"run_dir": "s3://bucket/other"}), (JobStatus.PENDING, None)]
    client.list_jobs.return_value = [
        SimpleNamespace(submission_id="job-0", status=status, metadata=metadata) for status, metadata in earlier
    ]
    monkeypatch.setattr("cluster.submit.CODE", tmp_path)
    monkeypatch.setattr("cluster.submit.connect", lambda _: client)
    monkeypatch.setattr("cluster.submit._follow", AsyncMock(side_effect=KeyboardInterrupt if interrupted else None))
    assert main(["submit", str(config), "--redo", "--force", "a test", "train.epochs=1"]) == code
    assert shlex.split(client.submit_job.call_args.kwargs["entrypoint"]) == (
        ["python", "-m", "pipeline", "run", "corpus.toml", "--redo", "--force", "a test", "train.epochs=1"]
    )
    client.stop_job.assert_not_called()
    client.list_jobs.return_value[0].status = JobStatus.RUNNING
    with pytest.raises(ValueError, match=r"job job-0 is at work on run_dir = 's3://bucket/run'; .* ray job stop job-0"):
        submit(str(config), [], [], None)


def test_memory_stays_with_a_process_that_computes_on_a_cpu() -> None:
    cpu, gpu = config().cluster, config(engine_gpus=1, worker_gpus=2).cluster
    for options in (engine_options, worker_options):
        assert options(cpu)["runtime_env"]["env_vars"]["MALLOC_MMAP_MAX_"] == "0"
        assert options(gpu)["runtime_env"] == {}
    assert (engine_options(gpu)["num_gpus"], worker_options(gpu)["num_gpus"]) == (1, 2)
