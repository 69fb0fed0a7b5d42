"""A Ray cluster of several raylets on this machine: started as a cluster manager would, and easy to kill part by part.

In: the CPUs that each node is to have, the head first. Out: a cluster with token authentication and a job server, of
which nothing is left at the end of the block. Every node has its own ports and temporary files; all share the
machine's cores, whatever CPUs they say they have, so nothing here tells how fast a cluster is.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

DEADLINE_S = 600.0  # for anything at all: the machine may be busy with something else
ENGINE, WORKER = "MapWorker", "RayTrainWorker"  # classes of the actors that write and that train
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
# A node that vanished is noticed within seconds; workers are not niced, so that all nodes share the cores alike.
_SETTINGS = {"RAY_health_check_period_ms": "500", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "token"}


class LocalCluster:
    """`address` is for drivers, `url` for the job server; `environment` is what a process needs to be let in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._token = secrets.token_hex(16)
        (folder / "token").write_text(self._token)
        gcs, dashboard = free_port(), free_port()
        self.address, self.url = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        # Jobs call `python`, which is ours.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._node_environment = (
            os.environ | _SETTINGS | {"PATH": path, "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_ADDRESS": ""}
        )
        self.environment = self._node_environment | {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.url}

    def start_head(self, cpus: int, *arguments: str, **environment: str) -> None:
        """Start the head with the job server; `arguments` are further ones of `ray start`."""
        ports = ["--head", f"--port={self.address.rpartition(':')[2]}"]
        ports += [f"--dashboard-port={self.url.rpartition(':')[2]}", "--include-dashboard=true"]
        self._start(cpus, [*ports, *arguments], environment)
        until(self._is_up)

    def add_node(self, cpus: int, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a node without waiting until it has joined; `arguments` are further ones of `ray start`."""
        self._start(cpus, [f"--address={self.address}", *arguments], environment)
        return self._nodes[-1]

    def _start(self, cpus: int, arguments: list[str], environment: dict[str, str]) -> None:
        name = f"n{len(self._nodes)}"
        command = [*_RAY, "start", "--block", "--disable-usage-stats", f"--num-cpus={cpus}"]
        command += [f"--object-store-memory={128 << 20}", f"--temp-dir={self._folder / name}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        with (self._folder / f"{name}.log").open("wb") as log:
            self._nodes.append(
                subprocess.Popen(
                    command + arguments,
                    stdout=log,
                    stderr=log,
                    env=self._node_environment | environment,
                    start_new_session=True,
                )
            )

    def _is_up(self) -> bool:
        log = (self._folder / "n0.log").read_text()
        assert self._nodes[0].poll() is None, f"the head ended:\n{log[-4000:]}"
        try:
            return bool(self.nodes())
        except httpx.HTTPError:
            return False

    def nodes(self) -> list[str]:
        """Return the ids of the nodes that are alive, the head's first."""
        alive = [node for node in self.state("nodes") if node["state"] == "ALIVE"]
        return [node["node_id"] for node in sorted(alive, key=lambda node: not node["is_head_node"])]

    def state(self, kind: str) -> list[dict[str, Any]]:
        """Return what the head knows about its "nodes" or "actors", dead ones included."""
        url, headers = f"{self.url}/api/v0/{kind}?limit=10000&detail=1", {"Authorization": f"Bearer {self._token}"}
        return httpx.get(url, headers=headers, timeout=30).raise_for_status().json()["data"]["result"]["result"]

    def actor_nodes(self, name: str) -> set[str]:
        """Return the nodes on which actors of a class are or were."""
        return {actor["node_id"] for actor in self.state("actors") if name in actor["class_name"] and actor["node_id"]}

    def actors(self, name: str) -> list[psutil.Process]:
        """Return the processes of the living actors of a class; what they are at follows the class in their titles."""
        return [process for process in self._processes() if title(process).startswith(f"ray::{name}")]

    def raylets(self) -> list[psutil.Process]:
        """Return the raylets of all nodes but the head."""
        found = []
        for node in self._nodes[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child for child in psutil.Process(node.pid).children() if child.name() == "raylet"]
        return found

    def stop(self) -> None:
        """Kill every process of the cluster: those that have its token."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self._nodes:
            node.wait()

    def _processes(self) -> Iterator[psutil.Process]:
        token = f"RAY_AUTH_TOKEN_PATH={self._folder}/token".encode()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                # Whole, since a process that gave itself a title may have overwritten the beginning.
                if process.pid != os.getpid() and token in Path(f"/proc/{process.pid}/environ").read_bytes():
                    yield process


@contextlib.contextmanager
def local_cluster(cpus: Sequence[int]) -> Iterator[LocalCluster]:
    """Run a cluster whose nodes have so many CPUs, the head first, until the block ends."""
    with empty_cluster() as cluster:
        cluster.start_head(cpus[0])
        for count in cpus[1:]:
            cluster.add_node(count)
        until(lambda: len(cluster.nodes()) == len(cpus))
        yield cluster


@contextlib.contextmanager
def empty_cluster() -> Iterator[LocalCluster]:
    """Give a cluster that has no node yet."""
    # Sockets lie under it, whose paths may not be longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = LocalCluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.stop()


def title(process: psutil.Process) -> str:
    """Return what a Ray worker calls itself, or "" if it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition to be true and return its value; TimeoutError if it does not come true."""
    end = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {DEADLINE_S} s")
        time.sleep(0.2)
    return value


def free_port() -> int:
    """Return a port of this machine that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
