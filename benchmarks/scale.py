"""Does it scale? Memory, speed and files from ten thousand documents to a million, and the gain from 1 to 4 actors.

The script makes up the documents: JSONL files of 2,500 rows, about a hundred words each, one in a hundred a copy. They
go through read, dedup, chunk, question and answer on four raylets on this machine, one actor on each. No model runs: in
the engine's place stands one that waits as long as an engine that writes TOKENS_PER_S would take, and replies with
questions that fit the passage, some replies that cannot be parsed, and top-k arrays; its tokenizer counts bytes.
Chunking uses the model's own tokenizer. Every size has a driver of its own; memory is the kernel's peak of resident
bytes. What limits: the CPU, which actors, Ray and driver share; the gain is measured where the stand-in is slow.

    python -m benchmarks.scale benchmarks/demo/demo.toml --name scale    # the config's model and chunk settings
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks.raylets import ENGINE, local_cluster, title
from benchmarks.record import claim, parse_options, run_arm, save
from pipeline.answer import answer_job
from pipeline.base_model import load_base_model
from pipeline.chunk import chunk_documents
from pipeline.config import Config, Sampling, load_config
from pipeline.engine import Completion, EngineStats
from pipeline.question import question_job
from pipeline.read import read_documents
from pipeline.stage import Actors, only, ray_session, run_stages, watching
from pipeline.store import Stage

SIZES, QUICK_SIZES = (10_000, 100_000, 1_000_000), (500, 2000)
FILE_ROWS, QUICK_FILE_ROWS = 2500, 125
NODES = 4
TOKENS_PER_S = 50_000  # of one stand-in, over all requests of a batch
GAIN_TOKENS_PER_S = 2500
GAIN_PASSAGES, QUICK_GAIN_PASSAGES = 2400, 450  # per actor
SAMPLE_S = 1.0
STAGES = ("read", "dedup", "chunk", "question")  # in this order; answer goes with question
FIRST = ("Kar", "Lo", "Mar", "Ten", "Hes", "Ola", "Bri", "Vos", "Dun", "Sel", "Ran", "Wil", "Tor", "Eck", "Nor", "Pel")
NEXT = ("den", "wes", "tal", "rin", "mor", "gas", "lin", "bur", "sta", "ven", "hol", "ker", "dam", "fel", "nau", "sen")
KINDS = ("Mill", "Bridge", "Lighthouse", "Abbey", "Foundry", "Observatory", "Harbour", "Library", "Quarry", "Brewery")
TRADES = ("engineer", "abbot", "merchant", "mason", "botanist", "captain", "printer", "surveyor")
NAMED = re.compile(rf"\b[Tt]he ([A-Z]\w+ (?:{'|'.join(KINDS)}))\b")


def make_document(number: int) -> dict[str, str]:
    """Return document `number`: facts about a place of its own, or a copy of an earlier document."""
    while number % 100 == 99:
        number //= 2
    state = number * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    state = (state ^ state >> 29) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1

    def pick(shift: int, count: int) -> int:
        return (state >> shift) % count

    name = FIRST[number % 16] + "".join(NEXT[number >> shift & 15] for shift in (4, 8, 12, 16))
    kind, town, person = KINDS[pick(3, 10)], FIRST[pick(7, 16)] + NEXT[pick(11, 16)], FIRST[pick(13, 16)] + "ia"
    title, year = f"{name} {kind}", 1700 + pick(17, 250)
    return {
        "title": title,
        "text": f"The {title} stands on the river {FIRST[pick(19, 16)]}a near {town}, and was built in {year}. "
        f"The {TRADES[pick(23, 8)]} {person} Holm drew the plans of the {title} within {2 + pick(29, 20)} months. "
        f"In {year + 20 + pick(31, 60)} a fire destroyed the roof of the {title}, and the people of {town} paid "
        f"{100 + pick(37, 9000)} crowns for a new one. Its tower is {10 + pick(41, 70)} metres high and holds "
        f"{1 + pick(43, 12)} bells, of which the largest weighs {200 + pick(47, 3000)} kilograms. Until "
        f"{1900 + pick(5, 60)} barges brought {3 + pick(9, 90)} tonnes of stone a week to its landing. "
        f"Today the {title} is a museum with {1000 + pick(21, 40000)} visitors a year, who come for its "
        f"{5 + pick(27, 200)} drawings and for the view over {town}.",
    }


def write_corpus(folder: Path, num_documents: int, file_rows: int) -> list[str]:
    """Write what is missing of the first `num_documents` documents and return their files."""
    folder.mkdir(exist_ok=True)
    files = []
    for start in range(0, num_documents, file_rows):
        file = folder / f"{start:08d}.jsonl"
        files.append(str(file))
        if not file.exists():
            rows = (json.dumps(make_document(number)) for number in range(start, start + file_rows))
            file.write_text("\n".join(rows))
    return files


class ByteTokenizer:
    """Renders a chat as the bytes of its messages."""

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> list[int]:
        return list("\n".join(message["content"] for message in chat).encode())


class StandIn:
    """Takes the engine's place: waits as long as one that writes `tokens_per_s` would, and computes next to nothing."""

    def __init__(self, tokens_per_s: float, top_k: int) -> None:
        rng = np.random.default_rng(0)
        self._speed = tokens_per_s
        self._ids = rng.integers(0, 49152, (4096, top_k), dtype=np.int32)
        self._logprobs = (np.sort(-rng.exponential(3, self._ids.shape))[:, ::-1] - 2).astype(np.float32)
        self.tokenizer = ByteTokenizer()
        self.max_model_len = 1 << 20
        self.stats = EngineStats()

    def complete(
        self, prompts: Sequence[Sequence[int]], seed: int, sampling: Sampling, max_tokens: int, top_k: int = 0, **_: Any
    ) -> list[Completion]:
        """Questions where no top-k is asked for, answers where it is; every fiftieth reply is of no use."""
        started = time.monotonic()
        replies = []
        for number, prompt in enumerate(prompts):
            tail = bytes(prompt[-250:]).decode(errors="ignore")
            name = (NAMED.findall(tail) or ["place"])[-1]
            text = (
                f"The {name} stands near the river, as every visitor of the {name} knows."
                if top_k
                else (f"1. Where does the {name} stand?" if (seed + number) % 50 else "I cannot say.")
            )
            start, length = (seed + 31 * number) % 4000, min(max_tokens, len(text) // 5)
            here = slice(start, start + length)
            replies.append(
                Completion(text, "stop", self._ids[here, 0], self._ids[here, :top_k], self._logprobs[here, :top_k])
            )
        num_tokens = sum(len(reply.token_ids) for reply in replies)
        time.sleep(max(0.0, num_tokens / self._speed - (time.monotonic() - started)))
        self.stats = EngineStats(
            self.stats.prompt_tokens + sum(map(len, prompts)),
            self.stats.cached_tokens,
            self.stats.output_tokens + num_tokens,
            self.stats.engine_seconds + time.monotonic() - started,
        )
        return replies


def make_config(options: argparse.Namespace, run_dir: str, paths: list[str], address: str) -> Config:
    """The config's model and chunks, and one question a passage."""
    overrides = {
        "run_dir": run_dir,
        "read.paths": json.dumps(paths),
        "read.unit_files": 1,
        "question.per_passage": 1,
        "question.per_call": 1,
        "question.kinds": '["fact"]',
        "question.max_rounds": 2,
        "cluster.address": address,
        "cluster.num_engines": NODES,
        "cluster.engine_cpus": 1,
    }
    return load_config(options.config, [*options.overrides, *(f"{key}={value}" for key, value in overrides.items())])


def write_passages(config: Config, num_actors: int, tokens_per_s: float) -> None:
    base = load_base_model(config.model.path)
    load_engine = partial(StandIn, tokens_per_s, config.answer.top_k)
    questions = question_job(config, base)
    jobs = [questions, answer_job(config, base, questions)]
    run_stages(jobs, Actors(config.cluster, num_actors, load_engine=load_engine))


def run_line(options: argparse.Namespace, request: dict[str, Any]) -> dict[str, Any]:
    """One driver: all stages over the files of the request."""
    config = make_config(options, request["run_dir"], request["paths"], request["address"])
    seconds, marks = {}, [time.monotonic()]

    def mark(stage: str) -> None:
        marks.append(time.monotonic())
        seconds[stage] = round(marks[-1] - marks[-2], 1)

    with ray_session():
        only(read_documents([config]))
        mark("read, dedup")
        only(chunk_documents([config]))
        mark("chunk")
        write_passages(config, NODES, TOKENS_PER_S)
        mark("question, answer")
    manifests = {name: Stage(config.run_dir, name).require() for name in (*STAGES, "answer")}
    keys = ("rows_in", "rows_out", "rejected", "bytes", "seconds")
    return {"seconds": seconds, "stages": {name: {key: m[key] for key in keys} for name, m in manifests.items()}}


def run_gain(options: argparse.Namespace, request: dict[str, Any]) -> dict[str, Any]:
    """One driver: question and answer with some actors of slow stand-ins; units per second of the second half."""
    config = make_config(options, request["run_dir"], ["unused"], request["address"])
    given, chunk = Stage(request["given"], "chunk"), Stage(config.run_dir, "chunk")
    chunk.open({})
    for number, shard in zip(range(request["passages"] // config.chunk.shard_passages), given.shards(), strict=False):
        table = given.read_shard(shard)
        chunk.commit(f"{number:06d}", [table], [], table.num_rows)
    chunk.close(0)
    with ray_session():
        write_passages(config, request["actors"], GAIN_TOKENS_PER_S)
    folder = Path(config.run_dir, "answer", "units")
    ends = sorted(file.stat().st_mtime for file in folder.iterdir())
    warm = len(ends) // 2  # the start of the actors is left out
    seconds = sum(Stage(config.run_dir, name).require()["seconds"] for name in ("question", "answer"))
    rate = (len(ends) - warm) / (ends[-1] - ends[warm - 1])
    return {"units": len(ends), "units_per_s": rate, "seconds_with_start": round(seconds, 1)}


class Peak(NamedTuple):
    """The most that one process was seen with."""

    role: str  # driver, actor, raylet or gcs_server
    stage: str  # in work when it was first seen
    rss_mb: float  # VmHWM
    pss_mb: float
    files: int


class Watch:
    """Samples the memory and the open files of this process's descendants; what they are is in their command lines."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._turn = 0
        self.peaks: dict[int, Peak] = {}

    def look(self) -> None:
        """Take a sample of each; every fourth with the proportional set size, which takes longer to count."""
        self._turn += 1
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):  # it has ended
                self._sample(process, self._turn % 4 == 0)

    def _sample(self, process: psutil.Process, with_pss: bool) -> None:
        if "--arm" in (called := title(process)):
            role = "driver"
        elif called.startswith(f"ray::{ENGINE}"):
            role = "actor"
        elif process.name() in ("raylet", "gcs_server"):
            role = process.name()
        else:
            return
        begun = [name for name in STAGES if (self._run_dir / name / "settings.json").exists()]
        status = Path(f"/proc/{process.pid}/status").read_text()
        rss = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        pss = process.memory_full_info().pss / 2**20 if with_pss else 0.0
        last = self.peaks.get(process.pid)
        if last is None or last.role != role:  # a process begins as a fork of another
            last = Peak(role, begun[-1] if begun else "", 0, 0, 0)
        files = max(last.files, process.num_fds())
        self.peaks[process.pid] = last._replace(rss_mb=max(rss, last.rss_mb), pss_mb=max(pss, last.pss_mb), files=files)

    def summary(self) -> dict[str, Any]:
        """Return the peaks of the driver, and of every stage's actors, smallest first."""

        def describe(peaks: list[Peak]) -> dict[str, Any]:
            return {
                "rss_mb": sorted(round(peak.rss_mb) for peak in peaks),
                "pss_mb": sorted(round(peak.pss_mb) for peak in peaks),
                "open_files": max(peak.files for peak in peaks),
            }

        groups: dict[str, list[Peak]] = {}
        for peak in self.peaks.values():
            groups.setdefault(f"{peak.role} {peak.stage}" if peak.role == "actor" else peak.role, []).append(peak)
        return {name: describe(peaks) for name, peaks in groups.items()}


def count_files(run_dir: Path) -> dict[str, int]:
    """Return the number of files of every stage."""
    return {
        stage.name: sum(len(names) for _, _, names in os.walk(stage)) for stage in run_dir.iterdir() if stage.is_dir()
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every size, then the gain, on a cluster of this machine."""
    sizes, file_rows = (QUICK_SIZES, QUICK_FILE_ROWS) if options.quick else (SIZES, FILE_ROWS)
    runs, gain = {}, {}
    with local_cluster([1] * NODES) as cluster, tempfile.TemporaryDirectory() as name:
        os.environ.update(cluster.environment)
        folder = Path(name)
        for size in sizes:
            paths, run_dir = write_corpus(folder / "corpus", size, file_rows), folder / str(size)
            request = {"run_dir": str(run_dir), "paths": paths, "address": cluster.address}
            watch = Watch(run_dir)
            with watching(watch.look, SAMPLE_S):
                done = run_arm("benchmarks.scale", options, "line", request)
            runs[str(size)] = done | {"peaks": watch.summary(), "files": count_files(run_dir)}
            print(f"{size}: {json.dumps(runs[str(size)])}", file=sys.stderr)
        for actors in (1, NODES):
            request = {
                "run_dir": str(folder / f"gain-{actors}"),
                "given": str(folder / str(sizes[-1])),
                "address": cluster.address,
                "actors": actors,
                "passages": actors * (QUICK_GAIN_PASSAGES if options.quick else GAIN_PASSAGES),
            }
            gain[str(actors)] = run_arm("benchmarks.scale", options, "gain", request)
    return {"runs": runs, "gain": gain}


def make_claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the largest run with the smallest, and cost with the middle one, where starting up weighs little."""
    runs, gain = list(result["runs"].values()), result["gain"]
    first, last = runs[0], runs[-1]

    def growth(name: str) -> float:
        return round(max(last["peaks"][name]["rss_mb"]) / max(first["peaks"][name]["rss_mb"]), 3)

    def cost(run: dict[str, Any]) -> float:
        return sum(run["seconds"].values()) / run["stages"]["read"]["rows_in"]

    actors = max(growth(name) for name in last["peaks"] if name.startswith("actor"))
    efficiency = gain[str(NODES)]["units_per_s"] / gain["1"]["units_per_s"] / NODES
    return [
        claim("driver_memory_growth", growth("driver"), 1.1, at_most=True),
        claim("actor_memory_growth", actors, 1.1, at_most=True),
        claim("cost_per_document_growth", round(cost(last) / cost(runs[-2]), 3), 1.1, at_most=True),
        claim("efficiency_of_4_actors", round(efficiency, 3), 0.9),
    ]


def main() -> None:
    options = parse_options(__doc__, "scale")
    if options.arm:
        arm = {"line": run_line, "gain": run_gain}[options.arm]
        print(json.dumps(arm(options, json.load(sys.stdin))))
        return
    result = measure(options)
    about = {"engine": f"stand-in that waits, {TOKENS_PER_S} tokens/s; {GAIN_TOKENS_PER_S} where the gain is measured"}
    save(options.name, {"benchmark": "scale", "claims": make_claims(result), **about, **result})


if __name__ == "__main__":
    main()
