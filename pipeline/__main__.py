"""`python -m pipeline run CONFIG [section.key=value ...]`: documents in, adapter out; or one stage; or status, plan.

In: a TOML file and overrides. Out: progress on stderr, and one JSON object as the last line of stdout; of a file with
`corpora`, an object of objects. Exit code 0 if the work is done, 2 for bad input (a message, no traceback; it does not
stop the other corpora), 130 after Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

from pipeline.config import Config, load_configs

STAGES = ("read", "chunk", "write", "filter", "train", "evaluate", "report", "publish")
PARTS = ("question", "answer", "general")  # of write
MOST_HELD = 256  # run directories, against a second process: each is an open file


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "command", choices=["run", *STAGES, *PARTS, "status", "plan"], help="all stages, one, or a question"
    )
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--redo", action="store_true", help="empty a stage that was made with other settings")
    parser.add_argument("--force", metavar="REASON", help="publish an adapter that is below publish.gate, and say why")
    options = parser.parse_intermixed_args(arguments)
    try:
        loaded = load_configs(options.config, options.overrides)
        configs = {name: config for name, config in loaded.items() if isinstance(config, Config)}
        wrong = {name: error for name, error in loaded.items() if isinstance(error, ValueError)}
        # Stdout is for the result alone; DeepSpeed, among others, logs to it.
        with contextlib.redirect_stdout(sys.stderr):
            results = wrong | _command(options, configs)
    except OSError as error:  # storage or a cluster that cannot be reached
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    failed = {name: result for name, result in results.items() if isinstance(result, ValueError)}
    for name, error in failed.items():
        print(f"error: {name + ': ' if name else ''}{_message(error)}", file=sys.stderr)
    if "" in failed:
        return 2
    shown = {name: {"error": _message(result)} if name in failed else result for name, result in results.items()}
    print(json.dumps(shown.get("", {"corpora": shown})))
    return 2 if failed else 0


def _command(options: argparse.Namespace, configs: dict[str, Config]) -> dict[str, Any]:
    """Return the result of every corpus by its name, or the ValueError that stands for it."""
    command = options.command
    if command == "status":
        from pipeline.status import read_status

        return {name: read_status(config) for name, config in configs.items()}
    from pipeline.base_model import load_base_model
    from pipeline.resources import demands, refuse_small_machine
    from pipeline.stage import attempt, ray_session
    from pipeline.store import Folder

    first = next(iter(configs.values()))
    base = load_base_model(first.model.path)
    heavy = {"write"} if command in PARTS else {command}
    if command == "filter" and first.filter.min_initial_kl is not None:
        heavy = {"train"}
    if command in ("run", "plan", "evaluate"):
        heavy = {"write", "train"}
    refuse_small_machine(first.cluster, [each for each in demands(first) if each.stage in heavy])
    if command in ("run", "evaluate") and (judge := first.evaluate.judge) and judge.model:
        from pipeline.arms import judge_key, try_judge

        try_judge(judge, judge_key())
    with contextlib.ExitStack() as held, ray_session():
        for config in islice(configs.values(), MOST_HELD):
            held.enter_context(Folder(config.run_dir).hold())
        results = {name: attempt(partial(_prepare, config, command, base)) for name, config in configs.items()}
        for stage in STAGES if command == "run" else (command,):
            left = [name for name, result in results.items() if not isinstance(result, ValueError)]
            if left:
                done = _stage(stage, options)([configs[name] for name in left], base, options.redo)
                results |= zip(left, done, strict=True)
    if command == "run":
        from pipeline.status import summarise

        for name, published in results.items():
            if not isinstance(published, ValueError):
                results[name] = summarise(configs[name]) | {"adapter": published["uri"]}
    return results


def _prepare(config: Config, command: str, base: Any) -> None:
    """Raise ValueError for what would fail hours later."""
    from pipeline.base_model import refuse_unknown_layers
    from pipeline.held_out import refuse_long_contexts
    from pipeline.previous import previous_settings
    from pipeline.store import Folder

    model = config.evaluate.embedding_model
    if model and not os.path.isdir(model):
        raise ValueError(f"evaluate.embedding_model = {model!r}: no such folder; give a sentence-transformers model's")
    judge = config.evaluate.judge
    grades = command in ("run", "evaluate")
    if grades and judge and judge.model and not judge.url and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError("evaluate.judge.model needs OPENAI_API_KEY in the environment, or evaluate.judge.url; set one")
    refuse_long_contexts(config)
    if command in ("run", "write", *PARTS, "filter", "train"):
        previous_settings(config, base)
    if config.train.lora.target_modules != "all-linear":
        refuse_unknown_layers(config.model.path, config.train.lora.target_modules)
    folders = {"run_dir": Folder(config.run_dir)}
    if command in ("run", "publish"):
        folders["publish.registry"] = Folder(config.publish.registry)
    for field, folder in folders.items():
        try:
            folder.try_to_write()
        except OSError as error:
            raise ValueError(f"{field} = {folder}: cannot be written ({error})") from None
    folders["run_dir"].write_json("config.json", config.model_dump())


def _stage(name: str, options: argparse.Namespace) -> Callable[[list[Config], Any, bool], list[Any]]:
    """Return what does a stage of all corpora; imported when its turn comes, since torch and vLLM take seconds."""
    if name == "read":
        from pipeline.read import read_documents

        return lambda configs, base, redo: read_documents(configs, redo)
    if name == "chunk":
        from pipeline.chunk import chunk_documents

        return lambda configs, base, redo: chunk_documents(configs, redo)
    if name == "write" or name in PARTS:
        from pipeline.write import write

        return lambda configs, base, redo: write(configs, base, redo, PARTS if name == "write" else (name,))
    if name == "filter":
        from pipeline.filter import filter_answers

        return lambda configs, base, redo: filter_answers(configs, redo)
    if name == "train":
        from pipeline.train import train_adapters

        return train_adapters
    if name == "evaluate":
        from pipeline.evaluate import evaluate_adapters

        return evaluate_adapters
    from pipeline.stage import attempt

    if name == "plan":
        from pipeline.plan import make_plan

        return lambda configs, base, redo: [attempt(partial(make_plan, config, base, redo)) for config in configs]
    if name == "report":
        from pipeline.report import write_report

        return lambda configs, base, redo: [attempt(partial(write_report, config)) for config in configs]
    from pipeline.publish import publish_adapter

    return lambda configs, base, redo: [
        attempt(partial(publish_adapter, config, base, options.force)) for config in configs
    ]


def _message(error: ValueError) -> str:
    """Return what a person needs of an error, which may have crossed a Ray border."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, ValueError) else error)


if __name__ == "__main__":
    sys.exit(main())
