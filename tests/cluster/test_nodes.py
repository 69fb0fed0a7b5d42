"""Several real raylets: what is lost when parts of a cluster die, where a job's work runs, which nodes come and go.

Run by `make test-long`; every test starts a cluster or trains, and takes a minute or two.
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import yaml

from benchmarks import chaos
from benchmarks.faulty_bucket import faulty_bucket
from benchmarks.raylets import ENGINE, WORKER, empty_cluster, local_cluster, title, until
from pipeline.config import Train
from pipeline.store import Folder, Stage
from pipeline.student import KlScorer
from tests.conftest import ROOT
from tests.pipeline.test_run import DOCUMENTS, MODEL, finish
from tests.pipeline.test_run import start as start_driver
from tests.pipeline.test_train import answered as answered
from tests.pipeline.test_train import tiny_model as tiny_model
from tests.pipeline.test_train import train, write_run

pytestmark = pytest.mark.long

SMALL = chaos.Size(documents=12, questions=8, kills={}, pause_s=0)


@pytest.mark.parametrize("where", [[], ["--bucket"]], ids=["disk", "bucket"])
def test_nothing_is_lost_and_nothing_comes_twice(where: list[str]) -> None:
    """An engine, a raylet and the driver die; in a bucket, requests fail and stall as well."""
    command = [sys.executable, "-m", "benchmarks.chaos", "--quick", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    claims = json.loads(done.stdout.splitlines()[-1])["claims"]
    assert all(claim["met"] for claim in claims), claims


def test_a_submitted_job_works_on_several_nodes() -> None:
    """All stages on four nodes, the head without CPUs: two engines and two training workers, each on its own node.

    The nodes share a bucket that fails and stalls, and no folder but the model's.
    """
    with (
        local_cluster([0, 1, 1, 1]) as cluster,
        faulty_bucket() as bucket,
        # What is in the checkout travels to the cluster.
        tempfile.NamedTemporaryFile("w", dir=ROOT, suffix=".toml") as config,
    ):
        corpus = Folder(bucket.direct_uri("corpus"))
        for name, text in DOCUMENTS.items():
            corpus.write_bytes(name, (text or "").encode())
        config.write(
            f"""
            run_dir = "{bucket.uri("run")}"
            max_reject_share = 1.0
            [model]
            path = "{MODEL}"
            max_model_len = 1024
            [read]
            paths = ["{bucket.uri("corpus")}"]
            [chunk]
            shard_passages = 1
            [question]
            per_passage = 4
            max_rounds = 1
            max_tokens = 64
            [answer]
            max_tokens = 32
            [filter]
            keep_unfinished = true
            [train]
            epochs = 1
            row_tokens = 128
            lora = {{ rank = 8 }}
            [general]
            prompts = 6
            held_out = 4
            max_tokens = 24
            [evaluate]
            max_tokens = 8
            [publish]
            registry = "{bucket.uri("registry")}"
            name = "submitted"
            gate = {{ min_gap_closed = -9.0, max_retrieval_loss = 1.0, max_previous_loss = 1.0 }}
            [cluster]
            num_engines = 2
            engine_cpus = 1
            kv_cache_gb = 1
            num_workers = 2
            worker_cpus = 1
            """
        )
        config.flush()

        def call(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "cluster", command, config.name, *arguments],
                cwd=ROOT,
                env=cluster.environment,
                capture_output=True,
                text=True,
                timeout=600,
            )

        checked = call("check")
        assert checked.returncode == 0, checked.stderr
        missing = call("check", "cluster.num_workers=4")
        assert missing.returncode == 2 and "room for 3" in missing.stderr, missing.stderr
        done = call("submit")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr
        head, *others = cluster.nodes()
        writers, trainers = cluster.actor_nodes(ENGINE), cluster.actor_nodes(WORKER)
        assert len(others) == 3 and head not in writers | trainers
        assert len(writers) >= 2 and len(trainers) == 2
        assert call("submit", "train.epochs=2").returncode == 2, "the job's exit code is ours"
        result = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
        assert result["counts"]["answers"] > 0
        (version,) = Folder(bucket.direct_uri("registry/submitted")).folders()
        assert "adapter_model.safetensors" in Folder(bucket.direct_uri(f"registry/submitted/{version}")).list()
        assert bucket.requests()["faulty_share"] > 0.02


def test_nodes_come_for_waiting_engines_and_idle_ones_go(tmp_path: Path) -> None:
    """Ray's autoscaler starts from a head without CPUs; two engines ask for a node each, and both get work."""
    config = str(chaos.write_config(tmp_path, SMALL, engines=2))
    scaling = yaml.safe_load((ROOT / "cluster" / "fake_autoscaler.yaml").read_text())
    log = tmp_path / "log"
    with empty_cluster() as cluster:
        scaling["provider"]["gcs_address"] = cluster.address
        file = tmp_path / "autoscaler.yaml"
        file.write_text(yaml.safe_dump(scaling))
        environment = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        cluster.environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"  # see the file
        cluster.start_head(0, f"--autoscaling-config={file}", **environment)
        assert len(cluster.nodes()) == 1
        chaos.run(cluster, log, "read", config)
        chaos.run(cluster, log, "chunk", config)
        driver = chaos.start(cluster, log, "write", config, "cluster.engine_cpus=2")
        until(lambda: len(cluster.actors(ENGINE)) == 2)
        assert len(cluster.nodes()) == 3, "a node for each engine"
        assert driver.wait() == 0, log.read_text()[-4000:]
        assert len(cluster.actor_nodes(ENGINE)) >= 2
        until(lambda: len(cluster.nodes()) == 1)
    assert len(Stage(f"{tmp_path}/run", "answer").committed()) == SMALL.documents


STEADY = ["train.epochs=12", "train.checkpoint_steps=4"]


class Course(NamedTuple):
    losses: np.ndarray  # of every step
    kl: float  # of the adapter to the teacher, mean over the answers


def course(losses: list[float], adapter: Path, answered: Path, model: Path) -> Course:
    answers = Stage(str(answered), "filter").read_unit("0-00000")
    return Course(np.asarray(losses), float(KlScorer(Train(), str(model), 1, Folder(str(adapter))).kl(answers).mean()))


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, answered: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    folder = tmp_path_factory.mktemp("undisturbed")
    return course(*train(answered, tiny_model, folder, "cluster.num_workers=2", *STEADY), answered, tiny_model)


def assert_same(after: Course, undisturbed: Course) -> None:
    """Not to the last digit: sums in another order differ in bf16."""
    assert len(after.losses) == len(undisturbed.losses)
    assert np.abs(after.losses - undisturbed.losses).max() < 0.05 * undisturbed.losses[0]
    assert after.kl < undisturbed.losses[0] / 2, "it learnt"
    assert after.kl == pytest.approx(undisturbed.kl, rel=0.05)


def test_training_goes_on_when_a_worker_dies(
    undisturbed: Course, answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """One of two workers is killed in mid-epoch: the same call goes on from the last checkpoint."""
    killed_after: list[int] = []

    def kill() -> None:
        saved = until(lambda: list(tmp_path.glob("*/train/checkpoints/*.json")))
        workers = [child for child in psutil.Process().children(recursive=True) if WORKER in title(child)]
        workers[-1].kill()
        killed_after.append(int(saved[0].stem))

    killer = threading.Thread(target=kill)
    killer.start()
    losses, adapter = train(answered, tiny_model, tmp_path, "cluster.num_workers=2", *STEADY)
    killer.join()
    assert 0 < killed_after[0] < len(losses)
    assert_same(course(losses, adapter, answered, tiny_model), undisturbed)


def test_training_goes_on_with_another_number_of_workers(
    undisturbed: Course, answered: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Two workers, then one, then two, the driver killed in between."""
    config = write_run(tmp_path, answered, tiny_model)
    train_dir = tmp_path / "run" / "train"
    saved: set[Path] = set()
    for num_workers in (2, 1):
        driver = start_driver(config, "train", f"cluster.num_workers={num_workers}", *STEADY)
        saved = until(lambda before=saved: set((train_dir / "checkpoints").glob("*.json")) - before)
        driver.kill()
        driver.communicate()
    finish(config, "train", "cluster.num_workers=2", *STEADY)
    history = json.loads((train_dir / "history.json").read_text())
    assert [entry["step"] for entry in history] == list(range(1, len(undisturbed.losses) + 1))
    losses = [entry["loss"] for entry in history]
    assert_same(course(losses, train_dir / "adapter", answered, tiny_model), undisturbed)
