"""Passages -> Questions -> Answers, and the general ones: the stages that write, with engines that are loaded once.

In: the complete chunk stage. Out: the stages question, answer and general. An actor that has written the questions of a
shard answers them next; any of the stages can also run alone.
"""

from typing import Any

from pipeline.answer import answer_job
from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.general import general_job
from pipeline.question import question_job
from pipeline.schema import QUESTION
from pipeline.stage import Actors, run_stages
from pipeline.store import Stage


def write(
    config: Config, base: BaseModel, redo: bool = False, stages: tuple[str, ...] = ("question", "answer", "general")
) -> dict[str, Any]:
    """Run the stages and return their manifests by name; answers alone need the complete question stage."""
    if "answer" in stages and "question" not in stages:
        Stage(config.run_dir, "question", QUESTION).require()
    questions = question_job(config, base)
    jobs = {"question": questions, "answer": answer_job(config, base, questions), "general": general_job(config, base)}
    cluster = config.cluster
    actors = Actors(
        cluster, cluster.num_engines, cluster.engine_cpus, cluster.engine_gpus, config.model, config.answer.top_k
    )
    return dict(zip(stages, run_stages([jobs[name] for name in stages], actors, redo), strict=True))
