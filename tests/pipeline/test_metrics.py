"""Our metrics: what a dashboard asks for exists, and a real run's figures arrive at the port that Prometheus reads."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from benchmarks.raylets import empty_cluster, free_port, until
from pipeline import metrics
from pipeline.store import Stage, Unit
from tests.conftest import ROOT

DASHBOARD = ROOT / "cluster" / "grafana.json"


def exported() -> set[str]:
    """Return the names under which Ray exports our metrics."""
    counters = {f"ray_{metric.info['name']}_total" for metric in (metrics.REJECTED, *metrics.UNIT.values())}
    return counters | {f"ray_{gauge.info['name']}" for gauge in metrics.PROGRESS.values()}


def test_the_dashboard_asks_for_every_metric_and_for_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert set(re.findall(r"ray_\w+", asked)) == exported()
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "run"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_without_ray_nothing_is_counted_and_nothing_fails() -> None:
    metrics.record_unit(Stage("run", "read"), Unit("0", 2, 1, {"empty": 1}, [], 9, {"prompt_tokens": 0}))


@pytest.mark.long
def test_a_runs_figures_arrive_at_ray_s_metrics_port_and_in_its_logs(tmp_path: Path) -> None:
    """Documents, good and bad, on a cluster of one node; its actors are gone when the figures are read."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(3):
        (corpus / f"{number}.md").write_text(f"# Mill {number}\n\nThe mill number {number} has a wheel.\n")
    (corpus / "bad.pdf").write_bytes(b"%PDF-1.4 not a PDF")
    config = tmp_path / "corpus.toml"
    config.write_text(
        f"""
        run_dir = "{tmp_path}/run"
        model.path = "{ROOT}/.models/smollm2-135m-instruct"
        read.paths = ["{corpus}"]
        publish = {{ registry = "{tmp_path}/registry", name = "test" }}
        """
    )
    port = free_port()
    with empty_cluster() as cluster:
        cluster.start_head(2, f"--metrics-export-port={port}", RAY_metrics_report_interval_ms="1000")
        subprocess.run(
            [sys.executable, "-m", "pipeline", "read", config],
            cwd=ROOT,
            env=cluster.environment | {"RAY_LOGGING_CONFIG_ENCODING": "JSON"},
            check=True,
        )

        def series() -> dict[str, float]:
            """Return our series by name and stage, and by the reason of a rejection."""
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
                lines = reply.read().decode().splitlines()
            found = {}
            for line in lines:
                if name := re.match(r"ray_(distillery_\w+)\{(.*)\} (\S+)", line):
                    labels = dict(re.findall(r'(\w+)="([^"]*)"', name[2]))
                    assert labels["run"] == f"{tmp_path}/run"
                    found[" ".join([name[1], labels["stage"], *filter(None, [labels.get("reason")])])] = float(name[3])
            return found

        until(lambda: "distillery_rows_total dedup" in series())
        found = series()
        manifest = Stage(f"{tmp_path}/run", "read").require()
        assert found["distillery_rows_total read"] == manifest["rows_out"] == 3
        assert found["distillery_bytes_total read"] == manifest["bytes"]
        assert {f"distillery_rejected_rows_total read {reason}" for reason in manifest["rejected"]} < found.keys()
        logs = [line for log in cluster._folder.glob("n0/session_latest/logs/worker-*") for line in log.open()]
    lines = [json.loads(line) for line in logs if "unit committed" in line]
    assert {(line["run"], line["stage"]) for line in lines} == {(f"{tmp_path}/run", s) for s in ("read", "dedup")}
    assert all(line["node_id"] and line["job_id"] and line["unit"] for line in lines)
