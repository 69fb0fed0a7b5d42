"""What a run directory says about its run, from any terminal or machine, also while it runs.

In: the config (for its run directory). Out: rows, rejects with reasons, tokens/s and bytes of every stage.
"""

from collections.abc import Callable, Collection
from typing import Any

from pipeline.config import Config
from pipeline.score import ARMS
from pipeline.store import Folder, Stage, require_line

STAGES = ("read", "dedup", "chunk", "question", "answer", "filter", "general", "train", "evaluate")
# A stage's units of work are the shards, or the units, of another one.
UNITS: dict[str, tuple[str, Callable[[Stage], Collection[str]]]] = {
    "dedup": ("read", Stage.shards),
    "chunk": ("dedup", Stage.shards),
    "question": ("chunk", Stage.shards),
    "answer": ("chunk", Stage.shards),
    "filter": ("answer", Stage.committed),
    "reading": ("chunk", Stage.shards),
}


def stages_of(config: Config) -> dict[str, Stage]:
    """Return the stages that this config asks for, by name."""
    names = [*STAGES, *(f"baseline-{name}" for name in config.evaluate.baselines)]
    if config.update.forget_removed:
        names.append("forgotten")
    if config.reading.per_passage:
        names.append("reading")
    return {name: Stage(config.run_dir, name) for name in names}


def read_status(config: Config) -> dict[str, Any]:
    """Return one entry per stage that was begun: its state, totals so far, and how many units are left."""
    stages: dict[str, Any] = {}
    all_stages = stages_of(config)
    for name, stage in all_stages.items():
        if stage.folder.read_json("settings.json") is None:
            continue
        manifest = stage.manifest()
        totals = manifest or stage.totals()
        entry = {key: totals[key] for key in ("rows_in", "rows_out", "rejected", "bytes", "seconds") if key in totals}
        entry["state"] = "complete" if manifest else "unfinished"
        if manifest is None and name in UNITS:
            source, units = UNITS[name]
            entry["units_left"] = len(units(all_stages[source])) - len(stage.committed())
        if tokens := totals["stats"].get("output_tokens"):
            entry |= {"output_tokens": tokens, "tokens_per_s": _rate(totals["stats"])}
        if progress := stage.folder.read_json("progress.json") or (manifest is None and stage.read_progress()):
            entry["progress"] = progress
        stages[name] = entry
    return {"run_dir": str(Folder(config.run_dir)), "stages": stages}


def summarise(config: Config) -> dict[str, Any]:
    """Return the figures of a complete run that people compare."""
    manifests = {name: stage.require() for name, stage in stages_of(config).items()}
    question, answer, kept = manifests["question"], manifests["answer"], manifests["filter"]
    stats, training, evaluation = (
        answer["stats"],
        manifests["train"]["training"],
        require_line(config.run_dir, "evaluate")["evaluate"],
    )
    scores = evaluation.get("scores", {})
    answer_tokens = max(1, stats["answer_tokens"])
    rejected: dict[str, dict[str, int]] = {n: m["rejected"] for n, m in manifests.items() if m["rejected"]}
    return {
        **{name: evaluation.get(name) for name in ("metric", "questions", "questions_from")},
        "scores": {arm: scores[arm] for arm in ARMS if arm in scores},
        **{name: evaluation.get(name) for name in ("gap_closed", "gap_closed_interval")},
        **{name: evaluation.get(name) for name in ("kl_to_teacher", "kl_to_teacher_interval", "kl_comparisons")},
        "comparisons": evaluation.get("comparisons", []),
        "lost": evaluation.get("lost"),
        "counts": {
            "documents": manifests["dedup"]["rows_out"],
            "passages": manifests["chunk"]["rows_out"],
            "questions": question["rows_out"],
            "answers": kept["rows_out"],
            "rejected": rejected,
        },
        "questions_per_passage": round(question["rows_out"] / max(1, manifests["chunk"]["rows_out"]), 2),
        "coverage": {
            "passages_with_full_quota": _share(question["stats"], "passages_full", "passages"),
            "words_told": _share(kept["stats"], "words_told", "words"),
        },
        "bytes_per_answer_token": round(answer["bytes"] / answer_tokens, 1),
        "tail_mass": round(stats["tail_mass_sum"] / answer_tokens, 4),
        "prefix_hit_rate": {
            name: _share(manifests[name]["stats"], "cached_tokens", "prompt_tokens") for name in ("question", "answer")
        },
        "tokens_per_s": {
            "question": _rate(question["stats"]),
            "answer": _rate(stats),
            "training": training["tokens_per_s"],
        },
        "training": training,
        "seconds": {name: manifest["seconds"] for name, manifest in manifests.items()},
    }


def _share(stats: dict[str, float], part: str, whole: str) -> float | None:
    return round(stats[part] / stats[whole], 4) if stats.get(whole) else None


def _rate(stats: dict[str, float]) -> float:
    return round(stats["output_tokens"] / max(stats["engine_seconds"], 1e-9), 1)
