"""Config -> what a run asks Ray for: pure arithmetic, no Ray.

In: `[cluster]` and the size of the base model. Out: one `Demand` per stage that needs more than a core, and, against
the nodes that exist, one sentence per demand that cannot be met.
"""

import math
from typing import Any, NamedTuple

from pipeline.config import Config

GPU_OVERHEAD = 1.2  # weights to memory: activations, CUDA context; keys and values come on top
NAMES = {"CPU": "CPU cores", "GPU": "GPUs"}


class Demand(NamedTuple):
    """`count` bundles of resources at the same time, each on one node; `least` of them let the run go on."""

    stage: str
    count: int
    least: int
    bundle: dict[str, float]
    settings: str  # the settings that decide it


def demands(config: Config) -> list[Demand]:
    """Return what the stages ask for; they run one after the other, so each has the cluster to itself."""
    cluster = config.cluster
    engine = {"CPU": float(cluster.engine_cpus), "GPU": float(cluster.engine_gpus)}
    worker = {"CPU": float(cluster.worker_cpus), "GPU": float(cluster.worker_gpus)}
    engines = Demand("write", cluster.num_engines, 1, engine, "cluster.num_engines, engine_gpus and engine_cpus")
    workers = Demand(
        "train",
        cluster.num_workers,
        cluster.num_workers,
        worker,
        "cluster.num_workers, worker_gpus and worker_cpus",
    )
    return [engines, workers]


def unmet(demand: Demand, nodes: list[dict[str, Any]]) -> str | None:
    """Say what is missing on nodes with these total resources, or None if the stage can run.

    Fewer engines than asked for only make the run slower; a training worker less, and it waits for ever.
    """
    bundle = {name: amount for name, amount in demand.bundle.items() if amount}
    places = sum(min(math.floor(node.get(name, 0) / amount) for name, amount in bundle.items()) for node in nodes)
    if places >= demand.least:
        return None
    asked = " and ".join(f"{amount:g} {NAMES[name]}" for name, amount in bundle.items())
    best = ", ".join(f"{max((node.get(name, 0) for node in nodes), default=0):g} {NAMES[name]}" for name in bundle)
    return (
        f"stage {demand.stage} needs {demand.least} x ({asked}), each on one node; there is room for {places}, and the "
        f"largest node has {best}. Add nodes, or lower {demand.settings}"
    )


def model_fits(config: Config, weight_bytes: int, gpu_bytes: int) -> str | None:
    """Say why the base model's weights do not fit the GPUs of one engine, or None if they do or there are no GPUs."""
    gpus = config.cluster.engine_gpus
    if not gpus:
        return None
    room = gpus * gpu_bytes * config.cluster.gpu_memory_share
    if weight_bytes * GPU_OVERHEAD <= room:
        return None
    needed = math.ceil(weight_bytes * GPU_OVERHEAD / (gpu_bytes * config.cluster.gpu_memory_share))
    return (
        f"the base model's weights are {weight_bytes / 2**30:.1f} GiB, too much for {gpus} GPUs of "
        f"{gpu_bytes / 2**30:.0f} GiB; set cluster.engine_gpus to {needed} or more"
    )
