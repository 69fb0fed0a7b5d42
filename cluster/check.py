"""Config -> what a run asks of a cluster, and what is missing there, before anything starts.

In: a TOML file and a running cluster. Out: one finding per line; no line means that the run can start. Tasks on the
nodes look at what only they see: the model's folder, the GPUs' memory, and whether run directory and registry are the
same place for all of them.
"""

import sys
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import Config
from pipeline.resources import demands, has_labels, loaded_bytes, model_fits, unmet
from pipeline.stage import CODE, NOT_CODE
from pipeline.store import Folder


def check(config: Config, address: str | None) -> list[str]:
    """Return what is missing; ValueError if there is no cluster to ask."""
    address = address or config.cluster.address or "auto"
    try:
        ray.init(address, log_to_driver=False, runtime_env={"working_dir": str(CODE), "excludes": NOT_CODE})
    except (ConnectionError, AuthenticationError) as error:
        raise ValueError(
            f"no Ray cluster at {address} ({error}); start one, give --address, and for a cluster with token "
            "authentication set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        for node in nodes:
            have = {name: node["Resources"].get(name, 0) for name in ("CPU", "GPU")}
            print(f"node {node['NodeManagerAddress']}: {have}", file=sys.stderr)
        found, demanded = [], demands(config)
        for demand in demanded:
            print(f"{demand.stage}: {demand.count} x {demand.bundle}", file=sys.stderr)
            found.append(unmet(demand, nodes))
        for node, view in zip(nodes, ray.get([_on(node, _look, config.model.path) for node in nodes]), strict=True):
            if view["weight_bytes"] is None:
                place = node["NodeManagerAddress"]
                found.append(f"node {place} has no model at model.path = {config.model.path!r}; put it there")
            elif view["gpu_bytes"] and any(has_labels(node["Labels"], demand.labels) for demand in demanded):
                found.append(model_fits(config, view["weight_bytes"], view["gpu_bytes"]))
        for field, uri in (("run_dir", config.run_dir), ("publish.registry", config.publish.registry)):
            found += _find_unshared(nodes, field, uri)
        return list(dict.fromkeys(finding for finding in found if finding))
    finally:
        ray.shutdown()


def _on(node: dict[str, Any], task: Any, *arguments: Any) -> Any:
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0)(task).options(scheduling_strategy=place).remote(*arguments)


def _look(model: str) -> dict[str, int | None]:
    import torch

    has_model = any(Path(model).glob("*.safetensors"))
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return {
        "weight_bytes": loaded_bytes(model, "bfloat16") if has_model else None,
        "gpu_bytes": min(gpus, default=0),
    }


def _find_unshared(nodes: list[dict[str, Any]], field: str, uri: str) -> list[str]:
    """Write a file from the last node and look for it from all of them; return what is wrong."""
    name = f"check-{uuid.uuid4().hex}"
    if error := ray.get(_on(nodes[-1], _write, uri, name)):
        return [
            f"{field} = {Folder(uri)} cannot be written from a node ({error}); give the nodes rights, or another place"
        ]
    seen = ray.get([_on(node, _sees, uri, name) for node in nodes])
    ray.get(_on(nodes[-1], _delete, uri, name))
    return [
        f"node {node['NodeManagerAddress']} does not see what another one wrote to {field} = {Folder(uri)}; give a "
        "bucket, or a folder that all nodes share"
        for node, sees in zip(nodes, seen, strict=True)
        if not sees
    ]


def _write(uri: str, name: str) -> str | None:
    try:
        Folder(uri).write_bytes(name, b"check")
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _sees(uri: str, name: str) -> bool:
    try:
        return Folder(uri).read_bytes(name) == b"check"
    except OSError:
        return False


def _delete(uri: str, name: str) -> None:
    Folder(uri).delete_file(name)
