"""`python -m pipeline run CONFIG [section.key=value ...]`: documents in, adapter out; or one stage; or status, plan.

In: a TOML file and overrides. Out: progress on stderr, and one JSON object as the last line of stdout.
Exit code 0 if the work is done, 2 for bad input (one message, no traceback), 130 after Ctrl-C.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

from pipeline.config import Config, load_config

STAGES = ("read", "chunk", "question", "answer", "filter", "train", "evaluate", "publish")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["run", *STAGES, "status", "plan"], help="all stages, one, or a question")
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--redo", action="store_true", help="empty a stage that was made with other settings")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        # Stdout is for the result alone; DeepSpeed, among others, logs to it.
        with contextlib.redirect_stdout(sys.stderr):
            result = _command(options.command, config, options.redo)
    except ValueError as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(json.dumps(result))
    return 0


def _command(command: str, config: Config, redo: bool) -> dict[str, Any]:
    if command == "status":
        from pipeline.status import read_status

        return read_status(config)
    from pipeline.base_model import load_base_model
    from pipeline.evaluate import load_questions

    base = load_base_model(config.model.path)
    load_questions(config.evaluate)
    from pipeline.stage import ray_session
    from pipeline.store import Folder

    Folder(config.run_dir).write_json("config.json", config.model_dump())
    with ray_session(config.cluster):
        if command == "plan":
            from pipeline.plan import make_plan

            return make_plan(config, base)
        for stage in STAGES if command == "run" else (command,):
            result = _stage(stage)(config, base, redo)
    if command == "run":
        from pipeline.status import summarise

        return summarise(config) | {"adapter": result["uri"]}
    return result


def _stage(name: str) -> Callable[[Config, Any, bool], dict[str, Any]]:
    """Import a stage when its turn comes: torch and vLLM take seconds."""
    if name == "read":
        from pipeline.read import read_documents

        return lambda config, base, redo: read_documents(config.run_dir, config.read, config.max_reject_share, redo)
    if name == "chunk":
        from pipeline.chunk import chunk_documents

        return lambda config, base, redo: chunk_documents(
            config.run_dir, config.chunk, base.path, config.max_reject_share, redo
        )
    if name == "question":
        from pipeline.question import write_questions

        return write_questions
    if name == "answer":
        from pipeline.answer import write_answers

        return write_answers
    if name == "filter":
        from pipeline.filter import filter_answers

        return filter_answers
    if name == "train":
        from pipeline.train import train_adapter

        return train_adapter
    if name == "evaluate":
        from pipeline.evaluate import evaluate_adapter

        return evaluate_adapter
    from pipeline.publish import publish_adapter

    return lambda config, base, redo: publish_adapter(config, base)


def _message(error: ValueError) -> str:
    """Return what a person needs of an error, which may have crossed a Ray border."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, ValueError) else error)


if __name__ == "__main__":
    sys.exit(main())
