"""Passages -> Questions -> Answers, and the general ones: the stages that write, with engines that are loaded once.

In: the complete chunk stages of one corpus or many. Out: the stages question, answer and general of each. An actor that
has written the questions of a shard answers them next; any of the stages can also run alone.
"""

from functools import partial
from typing import Any

from pipeline.answer import answer_job
from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.general import FORGOTTEN, forgotten_job, general_job
from pipeline.question import question_job
from pipeline.schema import QUESTION
from pipeline.stage import Actors, Job, attempt, run_stages
from pipeline.store import Stage

PARTS = ("question", "answer", "general")


def write(configs: list[Config], base: BaseModel, redo: bool = False, stages: tuple[str, ...] = PARTS) -> list[Any]:
    """Run the stages of several corpora; return for each its manifests by stage, or the ValueError.

    The corpora share model and settings, so the general answers are written once, for the first, and copied.
    """
    planned = [attempt(partial(_jobs, config, base, stages)) for config in configs]
    plans = [plan for plan in planned if not isinstance(plan, ValueError)]
    copies = [plan.pop("general") for plan in plans[1:] if "general" in plan]
    jobs = [job for plan in plans for job in plan.values()]
    first = configs[0]
    cluster = first.cluster
    load_engine = partial(Engine, first.model, cluster, first.answer.top_k)
    actors = Actors(
        cluster,
        cluster.num_engines,
        cluster.engine_cpus,
        cluster.engine_gpus,
        load_engine,
        cluster.engine_labels,
    )
    outcomes = iter(run_stages(jobs, actors, redo))
    for job in copies:
        if job.stage.open(job.settings, redo):
            job.stage.copy_from(plans[0]["general"].stage)
    results = []
    for plan in planned:
        if not isinstance(plan, ValueError):
            done = {name: next(outcomes) for name in plan}
            plan = next((error for error in done.values() if isinstance(error, ValueError)), done)
        results.append(plan)
    return results


def _jobs(config: Config, base: BaseModel, stages: tuple[str, ...]) -> dict[str, Job]:
    if "answer" in stages and "question" not in stages:
        Stage(config.run_dir, "question", QUESTION).require()
    questions = question_job(config, base)
    jobs = {"question": questions, "answer": answer_job(config, base, questions), "general": general_job(config, base)}
    jobs = {name: jobs[name] for name in stages}
    if config.update.forget_removed and "general" in stages:
        jobs[FORGOTTEN] = forgotten_job(config, base)
    return jobs
