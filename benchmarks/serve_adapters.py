"""How much does serving many adapters through the endpoint cost, against bare `vllm serve --enable-lora`?

    python -m benchmarks.serve_adapters MODEL [--adapters 64] [--slots 4] [--clients 16] [--requests 96]

Publishes adapters with random weights, then starts the two endpoints one after the other on this machine with the same
precision, cache, batch and slots, and sends both the same requests: base model only, 1, 8 and all adapters, uniform and
Zipf (s = 1). Bare vLLM is as it comes: without our LoRA kernel for CPUs, its engine in a process of its own; that is
where ratios above 1 come from. Every request asks for exactly 32 tokens and streams. What limits the number: the engine
on two cores, which shares them with the HTTP processes and with the load generator; with more adapters than slots,
copying weights into slots. Then the first use of adapters that the endpoint has never loaded, against a second use.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.random_adapters import publish_random_adapters
from benchmarks.raylets import free_port
from benchmarks.record import ROOT, claim, save
from pipeline.resources import compute_dtype
from serve.registry import Registry
from serve.server import TIE_NATS, lead_over

TOKENS = 32
KV_CACHE_GB = 2
MAX_MODEL_LEN = 512
RANK = 16
START_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="base-model folder")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96, help="requests of each traffic pattern")
    options = parser.parse_args()
    names = [f"adapter-{number:03d}" for number in range(options.adapters)]
    cold = [f"cold-{number}" for number in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        publish_random_adapters(folder, options.model, [*names, *cold], rank=RANK)
        patterns = traffic(Path(options.model).name, names, options.requests)
        with ours(folder, options) as url:
            own = {"base": asyncio.run(measure(url, patterns["base"], options.clients))}
            memory = {"after_base_traffic": memory_mb()}
            own |= {n: asyncio.run(measure(url, m, options.clients)) for n, m in patterns.items() if n != "base"}
            first_use = asyncio.run(measure_first_use(url, cold))
            right = asyncio.run(check_answers(url, Registry(folder), names, clients=32))
            moved = asyncio.run(measure_alias_move(url, Registry(folder), options.model, names[0]))
            memory["after_all_adapters"] = memory_mb()
            own["base again"] = asyncio.run(measure(url, patterns["base"], options.clients))
            memory["at_the_end"] = memory_mb()
        with bare(folder, names, options) as url:
            plain = {name: asyncio.run(measure(url, models, options.clients)) for name, models in patterns.items()}
    print(
        f"{'traffic':14} {'tokens/s':>9} {'bare':>9} {'ratio':>6} {'TTFT p50':>9} {'p95':>7} {'p99':>7} {'bare p50':>9}"
    )
    for name in patterns:
        a, b = own[name], plain[name]
        print(
            f"{name:14} {a['tokens_per_s']:9.1f} {b['tokens_per_s']:9.1f} "
            f"{a['tokens_per_s'] / b['tokens_per_s']:6.2f} {a['ttft_s']['p50']:9.2f} {a['ttft_s']['p95']:7.2f} "
            f"{a['ttft_s']['p99']:7.2f} {b['ttft_s']['p50']:9.2f}"
        )
    ratios = {name: own[name]["tokens_per_s"] / plain[name]["tokens_per_s"] for name in patterns}
    # What many adapters cost against one, on the same endpoint: copying into slots, and smaller groups in a batch.
    many = own[f"{options.adapters} uniform"]["tokens_per_s"]
    swapping = round(1 - many / own["1 adapter"]["tokens_per_s"], 3)
    print(f"answers as PEFT: {right}; share lost to {options.adapters} adapters on {options.slots} slots: {swapping}")
    result = {
        "benchmark": "serve_adapters",
        "model": Path(options.model).name,
        "settings": vars(options) | {"model": Path(options.model).name, "tokens": TOKENS, "rank": RANK},
        "endpoint": own,
        "bare_vllm": plain,
        "ratios": ratios,
        "first_use_s": first_use,
        "answers_as_peft": right,
        "alias_move": moved,
        "memory_mb": memory,
        "share_lost_to_swapping": swapping,
        "claims": [
            *(claim(f"throughput_over_bare_vllm.{name}", ratio, 0.9) for name, ratio in ratios.items()),
            claim("first_use_extra_s", first_use["extra_p50"], 2.0, at_most=True),
            claim("alias_move_s", moved["seconds"], 10, at_most=True),
            claim("failed_during_alias_move", moved["failed"], 0, at_most=True),
            claim("wrong_answers", right["wrong"], 0, at_most=True),
            claim("failed_requests", sum(m["failed"] for m in (*own.values(), right)), 0, at_most=True),
        ],
    }
    save(f"serve-adapters-{Path(options.model).name}", result)


def traffic(base: str, names: list[str], requests: int) -> dict[str, list[str]]:
    """Return the model of every request of every pattern, with a fixed seed."""
    rng = np.random.default_rng(0)
    zipf = 1 / np.arange(1, len(names) + 1)
    return {
        "base": [base] * requests,
        "1 adapter": names[:1] * requests,
        "8 uniform": rng.choice(names[:8], requests).tolist(),
        f"{len(names)} uniform": rng.choice(names, requests).tolist(),
        f"{len(names)} Zipf": rng.choice(names, requests, p=zipf / zipf.sum()).tolist(),
    }


async def measure(url: str, models: list[str], clients: int) -> dict[str, Any]:
    """Send the requests, so many at a time; return throughput and times to the first token.

    Every model is asked once before, since what its first use costs is measured apart.
    """
    say(f"{len(models)} requests of {clients} clients to {len(set(models))} models")
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:
        for model in sorted(set(models)):
            await ask(client, url, model, 0)
        gate = asyncio.Semaphore(clients)

        async def one(number: int) -> tuple[float, int]:
            async with gate:
                return await ask(client, url, models[number], number)

        started = time.monotonic()
        seen = await asyncio.gather(*(one(number) for number in range(len(models))))
        seconds = time.monotonic() - started
    first = [ttft for ttft, tokens in seen if tokens == TOKENS]
    p50, p95, p99 = np.percentile(first, [50, 95, 99])
    return {
        "tokens_per_s": round(sum(tokens for _, tokens in seen) / seconds, 2),
        "ttft_s": {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3)},
        "failed": len(seen) - len(first),
    }


async def ask(client: httpx.AsyncClient, url: str, model: str, number: int) -> tuple[float, int]:
    """Stream one answer of exactly TOKENS tokens; return the time to its first one, and the tokens that came."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Question {number}: what should one know about the town of Arden?"}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, tokens = time.monotonic(), 0.0, 0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first and chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
                first = time.monotonic() - started
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return first, tokens


async def check_answers(url: str, registry: Registry, names: list[str], clients: int) -> dict[str, int]:
    """Ask every adapter its probe question twice, all mixed; count the answers that are PEFT's, up to a tie."""
    say(f"{2 * len(names)} questions of {clients} clients to {len(names)} adapters, answers compared")
    order = np.random.default_rng(1).permutation(names * 2).tolist()
    probes = {name: registry.manifest(registry.resolve(name))["probe"] for name in names}
    counts = {"asked": len(order), "same": 0, "tied": 0, "wrong": 0, "failed": 0}
    gate = asyncio.Semaphore(clients)
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        async def one(name: str) -> str:
            body = {
                "model": name,
                "prompt": probes[name]["prompt_ids"],
                "max_tokens": len(probes[name]["answer_ids"]),
                "temperature": 0,
                "logprobs": 5,
                "return_tokens_as_token_ids": True,
            }
            async with gate:
                reply = await client.post(f"{url}/v1/completions", json=body)
            if reply.status_code != 200:
                say(f"{name}: {reply.status_code} {reply.text}")
                return "failed"
            return compare(reply.json()["choices"][0]["logprobs"], probes[name]["answer_ids"])

        for outcome in await asyncio.gather(*map(one, order)):
            counts[outcome] += 1
    return counts


async def measure_alias_move(url: str, registry: Registry, model_path: str, name: str) -> dict[str, Any]:
    """Publish a new version of an adapter under load; return the time from then on until it alone answers."""
    old = registry.resolve(name)
    seen: list[tuple[float, int, str]] = []  # when, status, model
    async with httpx.AsyncClient(timeout=600) as client:

        async def keep_asking() -> None:
            body = {"model": name, "prompt": "The mill", "max_tokens": 4}
            while not moved_at or not all(m != old.model_id for _, _, m in seen[-8:]):
                reply = await client.post(f"{url}/v1/completions", json=body)
                seen.append((time.monotonic(), reply.status_code, reply.json().get("model", "")))

        moved_at = 0.0
        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        await asyncio.to_thread(publish_random_adapters, registry.folder.uri, model_path, [name], RANK, seed=1)
        moved_at = time.monotonic()
        await asyncio.gather(*asking)
    last_old = max(when for when, _, model in seen if model == old.model_id)
    failed = sum(status != 200 for _, status, _ in seen)
    return {"seconds": round(max(0.0, last_old - moved_at), 3), "requests": len(seen), "failed": failed}


def say(text: str) -> None:
    """Tell on stderr what goes on: the whole takes half an hour."""
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


def memory_mb() -> int:
    """Return the resident memory of this process's children and theirs: the endpoint with its engine and Ray."""
    return sum(process.memory_info().rss for process in psutil.Process().children(recursive=True)) >> 20


def compare(logprobs: dict[str, Any], wanted: list[int]) -> str:
    """Say whether tokens are the wanted ones, another one where the two were tied, or wrong."""
    lead = lead_over(wanted, logprobs["tokens"], logprobs["top_logprobs"])
    return "same" if lead is None else "tied" if lead <= TIE_NATS else "wrong"


async def measure_first_use(url: str, names: list[str]) -> dict[str, Any]:
    """Ask each adapter twice in a row with nothing else running; return what the first use cost more."""
    async with httpx.AsyncClient(timeout=600) as client:
        pairs = [((await ask(client, url, n, 0))[0], (await ask(client, url, n, 1))[0]) for n in names]
    extra = sorted(first - second for first, second in pairs)
    return {"pairs": pairs, "extra_p50": round(extra[len(extra) // 2], 3), "extra_max": round(extra[-1], 3)}


@contextlib.contextmanager
def ours(registry: str, options: argparse.Namespace) -> Iterator[str]:
    """Run our endpoint."""
    config = Path(registry, "serve.toml")
    config.write_text(
        f"""
        run_dir = "{registry}/run"
        [model]
        path = "{options.model}"
        max_model_len = {MAX_MODEL_LEN}
        [read]
        paths = ["nothing"]
        [publish]
        registry = "{registry}"
        name = "none"
        [serve]
        adapter_slots = {options.slots}
        adapters_in_memory = {options.adapters}
        max_rank = {RANK}
        [cluster]
        kv_cache_gb = {KV_CACHE_GB}
        """
    )
    with run([sys.executable, "-m", "serve", str(config)]) as url:
        yield url


@contextlib.contextmanager
def bare(registry: str, names: list[str], options: argparse.Namespace) -> Iterator[str]:
    """Run `vllm serve` with every adapter named on its command line."""
    versions = map(Registry(registry).resolve, names)
    modules = [f"{version.name}={registry}/{version.name}/{version.version}" for version in versions]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    command += ["--served-model-name", Path(options.model).name, "--dtype", compute_dtype(on_gpu=False)]
    command += ["--enforce-eager"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "128", "--seed", "0"]
    command += ["--kv-cache-memory-bytes", str(KV_CACHE_GB << 30), "--host", "127.0.0.1"]
    command += ["--enable-lora", "--max-loras", str(options.slots), "--max-cpu-loras", str(options.adapters)]
    command += ["--max-lora-rank", str(RANK), "--lora-modules", *modules]
    with run(command) as url:
        yield url


@contextlib.contextmanager
def run(command: list[str]) -> Iterator[str]:
    port = free_port()
    command = [*command, f"serve.port={port}"] if "serve" in command else [*command, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        environment = os.environ | {"RAY_worker_niceness": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_S
            while not is_up(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{command[2]} did not start:\n{log.read().decode()[-4000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def is_up(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/v1/models").status_code == 200
    return False


if __name__ == "__main__":
    main()
