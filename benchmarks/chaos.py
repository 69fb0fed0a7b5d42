"""Does a run lose or repeat a row when engines, raylets and drivers are killed at random moments while it writes?

    python -m benchmarks.chaos            # on a disk all raylets share
    python -m benchmarks.chaos --bucket   # in a bucket on an S3 server that fails and stalls on one request in twenty

In: nothing; the corpus and a random model of two blocks, which asks in the corpus's words, are made on the spot. Out:
what was killed, and how the rows differ from those of an undisturbed run. Real vLLM on a local cluster of real raylets
with one engine each; what ends is started again, as a cluster manager would. All share the cores of one machine:
seconds are mostly those in which engines start, and say nothing about a cluster.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa

from benchmarks.faulty_bucket import FaultyBucket, faulty_bucket
from benchmarks.raylets import ENGINE, LocalCluster, local_cluster, title, until
from benchmarks.record import ROOT, claim, save
from pipeline.schema import digest
from pipeline.store import Stage

STAGES = ("question", "answer", "general")
_TEXT = (
    "mill wheel river stone barley flood lens mirror tower canal bridge harbour engine copper timber glass garden "
    "orchard market castle quarry furnace lantern compass anchor saddle cellar kettle hammer needle ribbon candle "
    "meadow valley summit glacier island forest desert marble granite silver pewter velvet cotton linen saffron "
    "pepper almond cherry walnut chestnut sparrow falcon badger otter salmon beetle spider turtle camel donkey"
)
WORDS = _TEXT.split()
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Size(NamedTuple):
    documents: int
    questions: int  # per document
    kills: dict[str, int]
    pause_s: float  # at most, between progress after a kill and the next


FULL = Size(130, 16, {"engine": 10, "raylet": 6, "driver": 4}, 2.0)
QUICK = Size(16, 8, {"engine": 1, "raylet": 1, "driver": 1}, 1.0)


def write_model(folder: Path) -> None:
    """Write a random two-block Llama whose tokens are the corpus's words, an eighth of them with a question mark."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<unk>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokens = [*specials, *WORDS, *(f"{word}?\n" for word in WORDS[::8])]
    words = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|end|>", additional_special_tokens=specials[2:]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]


def write_corpus(folder: Path, documents: int) -> None:
    """Write documents that all hold every word, so that whatever the model asks is about its passage."""
    folder.mkdir()
    for number in range(documents):
        words = random.Random(number).sample(WORDS, len(WORDS))
        sentences = (" ".join(words[start : start + 8]).capitalize() for start in range(0, len(words), 8))
        (folder / f"{number:04d}.txt").write_text(". ".join(sentences) + ".\n")


def write_config(folder: Path, size: Size, engines: int) -> Path:
    """Make corpus, model and a config whose units are one passage each."""
    write_model(folder / "model")
    write_corpus(folder / "corpus", size.documents)
    config = folder / "config.toml"
    config.write_text(
        f"""
        run_dir = "{folder}/run"
        max_reject_share = 1.0
        [model]
        path = "{folder}/model"
        max_model_len = 1024
        [read]
        paths = ["{folder}/corpus"]
        [chunk]
        shard_passages = 1
        [question]
        per_passage = {size.questions}
        kinds = ["fact", "detail"]
        per_call = 4
        max_tokens = 64
        temperature = 1.0
        [answer]
        top_k = 8
        max_tokens = 96
        [general]
        prompts = 200
        held_out = 16
        max_tokens = 64
        [publish]
        registry = "{folder}/registry"
        name = "chaos"
        gate = {{ min_gap_closed = -9.0, max_retrieval_loss = 1.0, max_previous_loss = 1.0 }}
        [cluster]
        num_engines = {engines}
        engine_cpus = 1
        kv_cache_gb = 1
        """
    )
    return config


def start(cluster: LocalCluster, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a command of the pipeline as a driver on the cluster."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            cwd=ROOT,
            env=cluster.environment,
            stdout=output,
            stderr=output,
        )


def run(cluster: LocalCluster, log: Path, *arguments: str) -> None:
    if start(cluster, log, *arguments).wait():
        raise RuntimeError(f"{arguments} failed:\n{log.read_text()[-4000:]}")


class Disturbance:
    """Kills parts of the cluster while a driver writes, one after the other, and starts again what was killed."""

    def __init__(
        self, cluster: LocalCluster, log: Path, command: list[str], run_dir: str, size: Size, seed: int
    ) -> None:
        self._cluster, self._log, self._command = cluster, log, command
        self._stages = {name: Stage(run_dir, name) for name in STAGES}
        self._random = random.Random(seed)
        self._size = size
        self._driver = start(cluster, log, *command)
        self.kills: list[dict[str, Any]] = []
        self.failed_drivers = 0
        self.committed: dict[str, str] = {}  # shards that were committed before the last kill, and their digests
        self._noted: set[tuple[str, str]] = set()

    def run(self) -> None:
        """Kill everything that is to be killed, and wait for the run's end."""
        kinds = list(Counter(self._size.kills).elements())
        self._random.shuffle(kinds)
        for kind in kinds:
            before = self._count()
            until(lambda before=before: self._keep_driver() and self._count() > before)
            time.sleep(self._random.uniform(0, self._size.pause_s))
            self._kill(kind)
        until(lambda: self._keep_driver() and self._driver.poll() == 0)

    def _count(self) -> int:
        return len(self._stages["answer"].committed())

    def _note_committed(self) -> None:
        for stage in self._stages.values():
            for name in stage.committed():
                if (stage.name, name) not in self._noted:
                    self._noted.add((stage.name, name))
                    unit = stage.find_unit(name)
                    assert unit, f"{stage.name}/{name} is listed and cannot be read"
                    self.committed |= digests(stage, unit.shards)

    def _keep_driver(self) -> bool:
        """Start a driver again that gave up; it should not, whatever was killed around it."""
        if self._driver.poll():
            self.failed_drivers += 1
            assert self.failed_drivers < 5, f"the driver fails again and again:\n{self._log.read_text()[-6000:]}"
            self._driver = start(self._cluster, self._log, *self._command)
        return True

    def _kill(self, kind: str) -> None:
        assert self._driver.poll() is None, f"the run ended after {len(self.kills)} kills; make it larger"
        self._note_committed()
        engines = lost = self._cluster.actors(ENGINE)
        victim = psutil.Process(self._driver.pid)
        if kind == "engine":
            victim = self._random.choice(until(lambda: self._cluster.actors(ENGINE)))
            lost = [victim]
        elif kind == "raylet":
            victim = self._random.choice(until(self._cluster.raylets))
            lost = [engine for engine in engines if engine in victim.children(recursive=True)]
        busy = [engine for engine in lost if title(engine).endswith(".submit")]
        victim.kill()
        self.kills.append({"kind": kind, "units_in_work": len(busy), "units_committed": self._count()})
        print(self.kills[-1], file=sys.stderr)
        if kind == "driver":
            self._driver.wait()
            self._driver = start(self._cluster, self._log, *self._command)
        if kind == "raylet":
            self._cluster.add_node(1)


def digests(stage: Stage, shards: list[str]) -> dict[str, str]:
    return {f"{stage.name}/{shard}": digest((stage.folder / "data").read_bytes(shard)) for shard in shards}


def all_digests(run_dir: str) -> dict[str, str]:
    """Return the digests of all committed shards by stage and name."""
    stages = [Stage(run_dir, name) for name in STAGES]
    return {name: value for stage in stages for name, value in digests(stage, stage.shards()).items()}


def ids(run_dir: str) -> Counter[str]:
    """Return how often every id of a row or a rejected row is there."""
    found: Counter[str] = Counter()
    for name in STAGES:
        stage = Stage(run_dir, name)
        for shard in stage.shards():
            found.update(f"{name} {row}" for row in stage.read_shard(shard, [stage.schema.names[0]])[0].to_pylist())
        found.update(f"{name} rejected {row}" for row in stage.read_rejected()["record_id"].to_pylist())
    return found


def counted(run_dir: str) -> bool:
    """True if the manifests' totals are those of the rows, and rows in = rows out + rejected."""
    for name in STAGES:
        stage = Stage(run_dir, name)
        manifest = stage.require()
        rejected: pa.Table = stage.read_rejected()
        rows = sum(stage.read_shard(shard, [stage.schema.names[0]]).num_rows for shard in stage.shards())
        if manifest["rows_in"] != rows + rejected.num_rows or manifest["rows_out"] != rows:
            return False
    return True


def measure(size: Size, engines: int, bucket: FaultyBucket | None, seed: int, folder: Path) -> dict[str, Any]:
    """Write undisturbed on the disk, and disturbed, and compare; what is there is looked at without the faults."""
    config = str(write_config(folder, size, engines))
    calm = f"{folder}/calm"
    wild, seen = (bucket.uri("wild"), bucket.direct_uri("wild")) if bucket else (f"{folder}/wild", f"{folder}/wild")
    log = folder / "log"
    with local_cluster([0, *[1] * engines]) as cluster:
        seconds = {}
        for run_dir in (calm, wild):
            for command in ("read", "chunk"):
                run(cluster, log, command, config, f"run_dir={run_dir}")
        started = time.monotonic()
        run(cluster, log, "write", config, f"run_dir={calm}")
        seconds["undisturbed"] = round(time.monotonic() - started, 1)
        started = time.monotonic()
        disturbance = Disturbance(cluster, log, ["write", config, f"run_dir={wild}"], seen, size, seed)
        disturbance.run()
        seconds["disturbed"] = round(time.monotonic() - started, 1)
        nodes = len(cluster.actor_nodes(ENGINE))
    expected, found = ids(calm), ids(seen)
    undisturbed, after = all_digests(calm), all_digests(seen)
    kills = disturbance.kills
    manifests = {name: Stage(seen, name).require() for name in STAGES}
    return {
        "kills": dict(Counter(kill["kind"] for kill in kills)),
        "failed_drivers": disturbance.failed_drivers,
        "nodes_with_engines": nodes,
        "seconds": seconds,
        "units": len(Stage(calm, "answer").committed()),
        "units_in_work_when_killed": sum(kill["units_in_work"] for kill in kills),
        "rows": {name: manifest["rows_out"] for name, manifest in manifests.items()},
        "rejected": {name: manifest["rejected"] for name, manifest in manifests.items()},
        "ids": expected.total(),
        "ids_lost": len(expected.keys() - found.keys()),
        "ids_new": len(found.keys() - expected.keys()),
        "ids_twice": sum(count > 1 for count in found.values()),
        "counted": counted(seen),
        "shards": len(undisturbed),
        "shards_changed_after_commit": sum(after.get(name) != value for name, value in disturbance.committed.items()),
        "shards_unlike_undisturbed": sum(after.get(name) != value for name, value in undisturbed.items()),
        "every_kill": kills,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few units and three kills; saves nothing unless named")
    parser.add_argument("--bucket", action="store_true", help="write into a bucket on a server that fails and stalls")
    parser.add_argument("--seed", type=int, default=0, help="what is killed when")
    parser.add_argument("--name", help="name of the result file")
    options = parser.parse_args()
    size, engines = (QUICK, 2) if options.quick else (FULL, 3)
    name = options.name or (None if options.quick else "chaos-bucket" if options.bucket else "chaos")
    with tempfile.TemporaryDirectory() as folder:
        if options.bucket:
            with faulty_bucket() as bucket:
                result = measure(size, engines, bucket, options.seed, Path(folder))
                result["requests"] = bucket.requests()
        else:
            result = measure(size, engines, None, options.seed, Path(folder))
    print(json.dumps({key: value for key, value in result.items() if key != "every_kill"}, indent=1), file=sys.stderr)
    wanted = sum(size.kills.values())
    claims = [
        claim("kills", sum(result["kills"].values()), wanted),
        claim("rows", result["rows"]["answer"], 2000 if not options.quick else 50),
        claim("ids lost", result["ids_lost"], 0, at_most=True),
        claim("ids new", result["ids_new"], 0, at_most=True),
        claim("ids twice", result["ids_twice"], 0, at_most=True),
        claim("shards changed after commit", result["shards_changed_after_commit"], 0, at_most=True),
        claim("drivers that gave up", result["failed_drivers"], 0, at_most=True),
    ]
    if options.bucket:
        claims.append(claim("share of requests that failed or stalled", result["requests"]["faulty_share"], 0.04))
    save(name, {"benchmark": "chaos", "claims": claims, **result})


if __name__ == "__main__":
    main()
