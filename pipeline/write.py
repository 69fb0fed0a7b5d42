"""Passages -> Questions -> Answers, and the general ones: the stages that write, with engines that are loaded once.

In: the complete chunk stages of one corpus or many. Out: the stages question, answer and general of each and, where
they are wanted, reading and forgotten. An actor that has written the questions of a shard answers them next; question,
answer and general can also run alone.
"""

from functools import partial
from typing import Any

from pipeline.answer import answer_job
from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.general import FORGOTTEN, forgotten_job, general_job
from pipeline.question import question_job
from pipeline.reading import READING, reading_job
from pipeline.resources import engine_options
from pipeline.stage import Actors, Job, attempt, run_stages
from pipeline.store import Stage

PARTS = ("question", "answer", "general")


def write(configs: list[Config], base: BaseModel, redo: bool = False, stages: tuple[str, ...] = PARTS) -> list[Any]:
    """Run the stages of several corpora; return for each its manifests by stage, or the ValueError.

    The corpora share model and settings, so the general answers are written once, for the first, and copied; not even
    once if a previous run has them.
    """
    planned = [attempt(partial(_jobs, config, base, redo, stages)) for config in configs]
    plans = {number: plan for number, plan in enumerate(planned) if not isinstance(plan, ValueError)}
    jobs = {(name, number): job for number, plan in plans.items() for name, job in plan.items()}
    general = [key for key in jobs if key[0] == "general"]
    written = {key: job for key, job in jobs.items() if key not in general[1:]}
    first = configs[0]
    cluster = first.cluster
    load_engine = partial(Engine, first.model, cluster, first.answer.top_k)
    actors = Actors(cluster, cluster.num_engines, engine_options(cluster), load_engine)
    done = dict(zip(written, run_stages(list(written.values()), actors, redo), strict=True))
    done |= {key: attempt(partial(_copy, jobs[key], jobs[general[0]].stage, redo)) for key in general[1:]}
    results = list(planned)
    for number, plan in plans.items():
        manifests = {name: done[name, number] for name in plan}
        results[number] = next((error for error in manifests.values() if isinstance(error, ValueError)), manifests)
    return results


def _copy(job: Job, source: Stage, redo: bool) -> dict[str, Any]:
    """Complete a job's stage with the rows of another corpus's, and return its manifest."""
    if job.stage.open(job.settings, redo):
        if not source.is_complete(job.settings):
            raise ValueError(f"general answers were to be copied from {source.folder}, which failed; mend that first")
        job.stage.copy_from(source)
    return job.stage.require()


def _jobs(config: Config, base: BaseModel, redo: bool, stages: tuple[str, ...]) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    if "answer" in stages and "question" not in stages:
        Stage(config.run_dir, "question").require()
    if {"question", "answer"} & set(stages):
        questions = question_job(config, base)
        if "question" not in stages:
            questions.stage.open(questions.settings)  # refuses questions that were written with other settings
        jobs = {"question": questions, "answer": answer_job(config, base, questions)}
    # First, since a refused stage takes the later ones of its run along, and this one is every corpus's.
    jobs = {name: job for name, job in ({"general": general_job(config, base)} | jobs).items() if name in stages}
    if config.reading.per_passage and "answer" in stages:
        jobs[READING] = reading_job(config, jobs["answer"])
    if config.update.previous_run is not None and "general" in stages:
        previous, general = Stage(config.update.previous_run, "general"), jobs["general"]
        if previous.is_complete(general.settings) and general.stage.open(general.settings, redo):
            general.stage.copy_from(previous)
    if config.update.forget_removed and "general" in stages:
        jobs[FORGOTTEN] = forgotten_job(config, base)
    return jobs
