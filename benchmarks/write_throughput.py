"""How many answer tokens a second does the pipeline write, top-k captured and stored, against the bare engine?

    python -m benchmarks.write_throughput CONFIG [KEY=VALUE ...] [--quick] [--name NAME]

The run's stored questions are answered again, each arm in a process of its own, with the same engine settings:

    pipeline   the answer stage on Ray Data: questions read, prompts rendered, answers written, Parquet committed
    limit      bare `vllm.LLM.generate` on the same prompts with the same logprobs, flat and not spelt out
    installed  the same, but without `KEEP_MEMORY` in its environment, which Ray's workers have here on a CPU
    no_top_k   as `limit`, without logprobs
    ray_llm    Ray's own `ray.data.llm` processor on the same prompts with the same logprobs

Loading the engine is left out: the pipeline's clock runs from one committed unit to the next, after a first small one;
the bare engine answers the same small batch first. `ray_llm` builds its engine anew for every pass, so that its clock
runs from the arrival of the first request to the last row in the driver, and its batches overlap. Every pass starts
with an empty prefix cache. What limits the number: the engine on so few cores; then what runs while it waits.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.record import claim, load_written, parse_options, run_arm, save, spread
from pipeline.answer import answer_id_of
from pipeline.base_model import load_base_model
from pipeline.config import Config
from pipeline.engine import engine_arguments, load_tokenizer, render_chat
from pipeline.prompts import teacher_chat
from pipeline.question import question_job
from pipeline.resources import KEEP_MEMORY, compute_dtype
from pipeline.schema import seed_of
from pipeline.store import Stage

# There and back, so that a machine that slows down does it to both.
ORDER = ("pipeline", "limit", "installed", "no_top_k", "ray_llm", "installed", "limit", "pipeline")
BARE = ("limit", "installed", "no_top_k")
WARM_UP = 4  # questions
QUICK = ["answer.max_tokens=24"]


def main() -> None:
    options = parse_options(__doc__, "write-throughput")
    if options.arm:
        request = json.loads(sys.stdin.read())
        config = load_written(options.config, [*options.overrides, *request["overrides"]])
        work = {"pipeline": write_pipeline, **dict.fromkeys(BARE, write_bare), "ray_llm": write_ray_llm}
        print(json.dumps(work[options.arm](config, request | {"arm": options.arm})))
        return
    config = load_written(options.config, options.overrides)
    request: dict[str, Any] = {"questions": 8, "passes": 1} if options.quick else {"questions": 64, "passes": 2}
    request["overrides"] = QUICK if options.quick else []
    order = ("pipeline", "limit", "no_top_k") if options.quick else ORDER
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
    for name in order:
        environment = KEEP_MEMORY if name in ("limit", "no_top_k") and not config.cluster.engine_gpus else {}
        runs[name].append(run_arm("benchmarks.write_throughput", options, name, request, **environment))
    arms = {name: summarise(own) for name, own in runs.items()}
    print(f"{'arm':10} {'tokens/s':>9} {'min':>7} {'max':>7} {'tokens':>7} {'prompt':>7} {'prefix cache':>12}")
    for name, arm in arms.items():
        speed = arm["tokens_per_s"]
        print(
            f"{name:10} {speed['median']:9.1f} {speed['min']:7.1f} {speed['max']:7.1f} {arm['output_tokens']:7} "
            f"{arm['prompt_tokens']:7} {'unknown' if arm['cache_hit_rate'] is None else arm['cache_hit_rate']:>12}"
        )
    print(f"of the pipeline's time {arms['pipeline']['engine_share']:.1%} is spent inside the engine")
    assert len({arm["prompt_tokens"] for arm in arms.values()}) == 1, "arms answer different prompts"
    assert len({arm["dtype"] for arm in arms.values()}) == 1, "arms write in different precisions"
    assert arms["pipeline"]["output_tokens"] == arms["limit"]["output_tokens"], "the same seed gave other answers"
    speed = {name: arm["tokens_per_s"]["median"] for name, arm in arms.items()}

    def ratio(name: str) -> float | None:
        return round(speed["pipeline"] / speed[name], 3) if name in speed else None

    save(
        options.name,
        {
            "benchmark": "write_throughput",
            "model": Path(config.model.path).name,
            "settings": {
                "answer": config.answer.model_dump(),
                "engine": engine_arguments(config.model, config.cluster),
                **request,
                "order": order,
                "quick": options.quick,
            },
            "arms": arms,
            "runs": runs,
            "claims": [
                claim("pipeline_over_limit", ratio("limit"), 0.95),
                claim("pipeline_over_installed", ratio("installed"), 0.95),
                claim("pipeline_over_no_top_k", ratio("no_top_k"), 0.85),
                claim("pipeline_over_ray_llm", ratio("ray_llm"), 1.0),
            ],
        },
    )


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Bring the passes of all rounds of an arm together."""
    passes = [one for run in runs for one in run["passes"]]
    cached = passes[0].get("cached_tokens")
    share = [one["engine_seconds"] / one["seconds"] for one in passes if "engine_seconds" in one]
    return {
        "tokens_per_s": spread([one["output_tokens"] / one["seconds"] for one in passes]),
        "output_tokens": round(statistics.mean(one["output_tokens"] for one in passes)),
        "prompt_tokens": passes[0]["prompt_tokens"],
        "cache_hit_rate": None if cached is None else round(cached / passes[0]["prompt_tokens"], 4),
        "dtype": runs[0]["dtype"],
    } | ({"engine_share": round(statistics.median(share), 4)} if share else {})


def chosen(config: Config, count: int) -> tuple[pa.Table, list[pa.Table]]:
    """Return the run's passages, and two batches of its questions: a small one to warm up, and those that count."""
    passages, questions = Stage(config.run_dir, "chunk"), Stage(config.run_dir, "question")
    table = pa.concat_tables(map(questions.read_shard, questions.shards()))
    batches = [table.slice(count, WARM_UP), table.slice(0, count)]
    assert [len(batch) for batch in batches] == [WARM_UP, count], f"{config.run_dir} has only {len(table)} questions"
    return pa.concat_tables(map(passages.read_shard, passages.shards())), batches


def requests(config: Config, passages: pa.Table, questions: pa.Table) -> tuple[list[list[int]], int]:
    """Return the teacher's prompts and the seed that the answer stage gives them."""
    tokenizer, answer = load_tokenizer(config.model.path), config.answer
    known = {row["passage_id"]: row for row in passages.to_pylist()}
    prompts, answer_ids = [], []
    for row in questions.to_pylist():
        passage = known[row["passage_id"]]
        prompt = render_chat(tokenizer, teacher_chat(passage["text"], passage["heading"], row["text"]))
        for ordinal in range(answer.per_question):
            prompts.append(prompt)
            answer_ids.append(answer_id_of(row["question_id"], ordinal, answer))
    return prompts, seed_of(answer.seed, *answer_ids)


def write_pipeline(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """Run the answer stage on a run directory whose first unit is the small batch and all others the large one."""
    from pipeline.stage import only, ray_session
    from pipeline.write import write

    passages, (small, large) = chosen(config, request["questions"])
    with tempfile.TemporaryDirectory() as folder:
        config = config.model_copy(update={"run_dir": folder})
        base = load_base_model(config.model.path)
        batches = [small, *[large] * request["passes"]]
        chunk = Stage(folder, "chunk")
        chunk.open({})
        for number in range(len(batches)):
            chunk.commit(f"{number:06d}", [passages], [], len(passages))
        chunk.close(0)
        question = Stage(folder, "question")
        question.open(question_job(config, base).settings)
        for number, questions in enumerate(batches):
            question.commit(f"{number:06d}-00000", [questions], [], len(questions))
        question.close(0)
        with ray_session():
            only(write([config], base, stages=("answer",)))
        units = Path(folder, "answer", "units")
        ends = [(units / f"{unit.name}.json").stat().st_mtime for unit in Stage(folder, "answer").units()]
        assert ends == sorted(ends), "units were not answered in order"
        stats = [unit.stats for unit in Stage(folder, "answer").units()]
    return {
        "dtype": compute_dtype(config.cluster.engine_gpus > 0),
        "passes": [
            {"seconds": end - begin, **{k: v for k, v in stat.items() if not k.startswith("tail")}}
            for begin, end, stat in zip(ends, ends[1:], stats[1:], strict=False)
        ],
    }


def write_bare(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """Let vLLM answer the same prompts, and do nothing with what it says."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch
    from vllm import LLM, SamplingParams

    top_k = 0 if request["arm"] == "no_top_k" else config.answer.top_k
    arguments: dict[str, Any] = engine_arguments(config.model, config.cluster) | {"max_logprobs": max(top_k, 1)}
    arguments |= {"disable_log_stats": True} | config.model.engine
    llm = LLM(model=config.model.path, **arguments)
    parameters = SamplingParams(**sampling(config, top_k), flat_logprobs=bool(top_k), detokenize=not top_k)
    passages, (small, large) = chosen(config, request["questions"])
    passes = []
    for questions in (small, *[large] * request["passes"]):
        prompts, seed = requests(config, passages, questions)
        llm.reset_prefix_cache()
        torch.manual_seed(seed)
        started = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        passes.append(
            {
                "seconds": time.monotonic() - started,
                "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
                "prompt_tokens": sum(map(len, prompts)),
                "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
            }
        )
    return {"dtype": str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."), "passes": passes[1:]}


def write_ray_llm(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    """Answer the same prompts in Ray's own processor, without its stages for templates and tokens."""
    import ray
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from pipeline.stage import ray_session

    passages, (_, large) = chosen(config, request["questions"])
    # As text: token ids would reach its engine as arrays, which it refuses. The arms' prompt tokens are compared.
    tokenizer = load_tokenizer(config.model.path)
    prompts = [tokenizer.decode(prompt) for prompt in requests(config, passages, large)[0]]
    top_k = config.answer.top_k
    parameters = sampling(config, top_k)
    with ray_session():
        # The processor's other stages ask for CPUs of their own and would wait forever where the engine holds them all.
        ray.init(num_cpus=config.cluster.engine_cpus + 4, include_dashboard=False, log_to_driver=False)
        arguments = engine_arguments(config.model, config.cluster) | {"max_logprobs": top_k}
        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=config.model.path,
                engine_kwargs=arguments | config.model.engine,
                placement_group_config=None
                if config.cluster.engine_gpus
                else {"bundles": [{"CPU": config.cluster.engine_cpus}]},
                batch_size=32,
                concurrency=1,
                log_engine_metrics=False,
                chat_template_stage=False,
                tokenize_stage=False,
                detokenize_stage=False,
            ),
            preprocess=lambda row: {"prompt": row["prompt"], "sampling_params": parameters},
        )
        rows = processor(ray.data.from_items([{"prompt": prompt} for prompt in prompts])).take_all()
        ended = time.time()
    assert all(len(step) >= top_k for row in rows for step in row["logprobs"]), "logprobs are missing"
    one = {
        "seconds": ended - min(row["metrics"]["arrival_time"] for row in rows),
        "output_tokens": sum(row["num_generated_tokens"] for row in rows),
        "prompt_tokens": sum(row["num_input_tokens"] for row in rows),
    }
    return {"dtype": arguments["dtype"], "passes": [one]}


def sampling(config: Config, top_k: int) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams that every arm shares."""
    answer = config.answer
    return {
        "temperature": answer.temperature,
        "top_p": answer.top_p,
        "top_k": answer.sampling_top_k,
        "max_tokens": answer.max_tokens,
        "logprobs": top_k or None,
    }


if __name__ == "__main__":
    main()
