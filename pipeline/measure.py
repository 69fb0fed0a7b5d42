"""Adapters + stored answers -> how far student and teacher, and student and base, are apart; and a probe.

In: a complete train stage, the teacher's answers to what evaluation asks, the general answers that were held out. Out:
KL in nats per token, and a training question with the adapter's greedy answer. All of it in plain PEFT on transformers,
which is the measure of a right answer for every other engine.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.general import HELD_OUT
from pipeline.schema import ANSWER, Probe
from pipeline.store import Folder, Stage

PROBE_QUESTIONS = 8
PROBE_TOKENS = 12


def measure_adapters(config: Config, base_path: str, gold: pa.Table, adapters: dict[str, Folder]) -> dict[str, Any]:
    """Return what the adapters say of stored answers, and the `probe`.

    `kl_to_teacher` has for every arm each gold answer's mean KL, [answers], and `answer_tokens` their lengths;
    `kl_to_base` has the mean over the general answers' tokens. Runs in a process of its own: torch keeps its memory.
    """
    from pipeline.student import KlScorer

    stage = Stage(config.run_dir, "general")
    general = stage.read_unit(HELD_OUT) if HELD_OUT in stage.committed() else ANSWER.empty_table()
    to_teacher, to_base, probe = {}, {}, {}
    for arm, source in adapters.items():
        scorer = None  # frees the last one's memory
        scorer = KlScorer(config.train, base_path, config.cluster.worker_cpus, source)
        if arm == "adapter":
            probe = asdict(_record_probe(config, scorer.model))
        if len(gold):
            if not to_teacher:
                to_teacher["closed_book"] = scorer.initial_kl(gold)
            to_teacher[arm] = scorer.kl(gold)
        if len(general):
            to_base[arm] = float(np.average(scorer.kl(general), weights=_lengths(general)))
    return {
        "kl_to_teacher": to_teacher,
        "answer_tokens": _lengths(gold),
        "kl_to_base": to_base,
        "general_prompts": len(general),
        "probe": probe,
    }


def _lengths(answers: pa.Table) -> np.ndarray:
    return np.asarray(pc.call_function("list_value_length", [answers["answer_ids"]]))


def _record_probe(config: Config, model: Any) -> Probe:
    """Record the adapter's greedy answer to the training question where it differs most from the base model's."""
    from pipeline.student import greedy_replies

    answers, questions = Stage(config.run_dir, "filter"), Stage(config.run_dir, "question")
    unit = next(unit.name for unit in answers.units() if unit.rows_out)
    asked = answers.read_unit(unit).select(["question_id", "prompt_ids"]).slice(0, PROBE_QUESTIONS).to_pylist()
    texts = {row["question_id"]: row["text"] for row in questions.read_unit(unit).to_pylist()}
    prompts = [row["prompt_ids"] for row in asked]
    replies = greedy_replies(model, prompts, PROBE_TOKENS)
    differing = [number for number, reply in enumerate(replies) if reply.adapter_ids != reply.base_ids]
    best = max(differing or range(len(replies)), key=lambda number: replies[number].margin)
    return Probe(texts[asked[best]["question_id"]], prompts[best], replies[best].adapter_ids)
