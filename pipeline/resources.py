"""Config -> what a run asks Ray for, and what it gets: arithmetic, without Ray.

In: `[cluster]`, and the base model's folder, for its size in the dtype that a machine computes in. Out: one `Demand`
per stage that needs more than a core, and, against the nodes that exist, one sentence per demand that is not met.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Cluster, Config

GPU_OVERHEAD = 1.2  # weights to memory: activations, CUDA context; keys and values come on top
NAMES = {"CPU": "CPU cores", "GPU": "GPUs"}
# For glibc: no memory is given back to the system before the process ends. Logits and activations are large, and every
# page of them that comes back from there costs a fault: up to a fifth of a training step on a CPU, and of an answer a
# tenth with a vocabulary of 150,000, nothing with one of 50,000.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


class Demand(NamedTuple):
    """`count` bundles of resources at the same time, each on one node; `least` of them let the run go on."""

    stage: str
    count: int
    least: int
    bundle: dict[str, float]
    labels: dict[str, str]  # selectors that a node's labels must match
    settings: str  # the settings that decide it


def demands(config: Config) -> list[Demand]:
    """Return what the stages ask for; they run one after the other, so each has the cluster to itself."""
    cluster = config.cluster
    engine = {"CPU": float(cluster.engine_cpus), "GPU": float(cluster.engine_gpus)}
    worker = {"CPU": float(cluster.worker_cpus), "GPU": float(cluster.worker_gpus)}
    engines = Demand(
        "write",
        cluster.num_engines,
        1,
        engine,
        cluster.engine_labels,
        "cluster.num_engines, engine_gpus, engine_cpus and engine_labels",
    )
    workers = Demand(
        "train",
        cluster.num_workers,
        cluster.num_workers,
        worker,
        cluster.worker_labels,
        "cluster.num_workers, worker_gpus, worker_cpus and worker_labels",
    )
    return [engines, workers]


def engine_options(cluster: Cluster) -> dict[str, Any]:
    """Return what an actor or a task that holds an engine asks of Ray."""
    return _options(cluster.engine_cpus, cluster.engine_gpus, cluster.engine_labels)


def worker_options(cluster: Cluster) -> dict[str, Any]:
    """Return what an actor or a task as large as a training worker asks of Ray."""
    return _options(cluster.worker_cpus, cluster.worker_gpus, cluster.worker_labels)


def _options(cpus: float, gpus: float, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "label_selector": labels,
        "runtime_env": {} if gpus else {"env_vars": KEEP_MEMORY},
    }


def cluster_address(cluster: Cluster) -> str | None:
    """Return the address of the Ray cluster to join; None for a local Ray, which has this machine alone."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or None


def this_machine(cluster: Cluster) -> dict[str, Any]:
    """Describe what a local Ray has, as `ray.nodes()` does; cores can be shared, so there are always enough for one."""
    resources = {"CPU": max(os.cpu_count() or 1, cluster.engine_cpus, cluster.worker_cpus)}
    if cluster.engine_gpus or cluster.worker_gpus:
        import torch

        resources["GPU"] = torch.cuda.device_count()
    return {"Resources": resources, "Labels": {}}


def refuse_small_machine(cluster: Cluster, demanded: Sequence[Demand]) -> None:
    """Raise ValueError if a local Ray has too little for what is demanded, and would wait for the rest in silence."""
    if cluster_address(cluster):
        return
    machine = [this_machine(cluster)]
    if missing := [text for demand in demanded if (text := unmet(demand, machine))]:
        raise ValueError("\n".join(missing))


def unmet(demand: Demand, nodes: list[dict[str, Any]]) -> str | None:
    """Say what is missing on these nodes, as `ray.nodes()` lists them, or None if the stage can run.

    Fewer engines than asked for only make the run slower; a training worker less, and it waits for ever.
    """
    bundle = {name: amount for name, amount in demand.bundle.items() if amount}
    asked = " and ".join(f"{amount:g} {NAMES[name]}" for name, amount in bundle.items())
    where = "".join(f" with {key} = {selector!r}" for key, selector in demand.labels.items())
    usable = [node["Resources"] for node in nodes if has_labels(node["Labels"], demand.labels)]
    if nodes and not usable:
        return (
            f"stage {demand.stage} needs nodes{where}, and none of the {len(nodes)} nodes is one. Label them "
            f"(ray start --labels), or change {demand.settings}"
        )
    places = sum(min(math.floor(node.get(name, 0) / amount) for name, amount in bundle.items()) for node in usable)
    if places >= demand.least:
        return None
    best = ", ".join(f"{max((node.get(name, 0) for node in usable), default=0):g} {NAMES[name]}" for name in bundle)
    return (
        f"stage {demand.stage} needs {demand.least} x ({asked}), each on one node{where}; there is room for {places}, "
        f"and the largest node has {best}. Add nodes, or lower {demand.settings}"
    )


def has_labels(labels: dict[str, str], selectors: dict[str, str]) -> bool:
    """Say whether a node with these labels matches all of Ray's selectors: "a", "!a", "in(a, b)", "!in(a, b)"."""
    for key, selector in selectors.items():
        wanted = re.split(r", ?", re.sub(r"^!?(in\()?|\)$", "", selector))
        if (labels.get(key) in wanted) == selector.startswith("!"):
            return False
    return True


def compute_dtype(on_gpu: bool) -> str:
    """Return the dtype of models and adapters in this process: bfloat16, or float32 on a CPU that is slow in it.

    Without AVX-512 (or Arm's bf16 instructions) PyTorch multiplies bf16 matrices number by number, far slower than
    float32.
    """
    import torch

    if on_gpu:
        return "bfloat16"
    # What PyTorch's own dispatch goes by; builds for a Mac come without this library.
    is_fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if is_fast else "float32"


def loaded_bytes(path: str, dtype: str) -> int:
    """Return how much memory the weights in a model's folder take in this dtype, whatever they are stored in."""
    import torch
    from transformers import AutoConfig

    stored: Any = AutoConfig.from_pretrained(path).dtype or torch.bfloat16
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    return size * getattr(torch, dtype).itemsize // stored.itemsize


def model_fits(config: Config, weight_bytes: int, gpu_bytes: int, memory_bytes: int | None = None) -> str | None:
    """Say why the base model does not fit the GPUs of one engine or, without any, the memory; None if it does.

    A training worker has to fit it into one GPU, even where ZeRO 3 shards it then.
    """
    cluster = config.cluster
    gpus = cluster.engine_gpus
    weights = f"the base model's weights are {weight_bytes / 2**30:.1f} GiB"
    if not gpus:
        if memory_bytes is None or weight_bytes + (cluster.kv_cache_gb << 30) <= memory_bytes:
            return None
        return (
            f"{weights}, too much with cluster.kv_cache_gb = {cluster.kv_cache_gb} for {memory_bytes / 2**30:.1f} GiB "
            "of memory; take a smaller model, or lower it"
        )
    if cluster.worker_gpus and weight_bytes * GPU_OVERHEAD > gpu_bytes:
        return (
            f"{weights}, too much for the GPU of {gpu_bytes / 2**30:.0f} GiB of a training worker, which loads all of "
            "them; take a smaller model, or larger GPUs"
        )
    room = gpu_bytes * cluster.gpu_memory_share
    if weight_bytes * GPU_OVERHEAD <= gpus * room:
        return None
    needed = math.ceil(weight_bytes * GPU_OVERHEAD / room)
    have = f"{gpus} GPUs of {gpu_bytes / 2**30:.0f} GiB"
    return f"{weights}, too much for {have}; set cluster.engine_gpus to {needed} or more"
