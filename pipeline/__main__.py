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

STAGES = ("read", "chunk", "write", "filter", "train", "evaluate", "report", "publish")
PARTS = ("question", "answer", "general")  # of write


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "command", choices=["run", *STAGES, *PARTS, "status", "plan"], help="all stages, one, or a question"
    )
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--redo", action="store_true", help="empty a stage that was made with other settings")
    parser.add_argument("--force", metavar="REASON", help="publish an adapter that is below publish.gate, and say why")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        # Stdout is for the result alone; DeepSpeed, among others, logs to it.
        with contextlib.redirect_stdout(sys.stderr):
            result = _command(options, config)
    except ValueError as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(json.dumps(result))
    return 0


def _command(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    command = options.command
    if command == "status":
        from pipeline.status import read_status

        return read_status(config)
    from pipeline.base_model import load_base_model
    from pipeline.held_out import load_questions, read_questions

    base = load_base_model(config.model.path)
    load_questions(config.evaluate)
    read_questions("evaluate.unrelated", config.evaluate.unrelated)
    from pipeline.stage import ray_session
    from pipeline.store import Folder

    Folder(config.run_dir).write_json("config.json", config.model_dump())
    with ray_session():
        if command == "plan":
            from pipeline.plan import make_plan

            return make_plan(config, base)
        for stage in STAGES if command == "run" else (command,):
            result = _stage(stage, options)(config, base, options.redo)
    if command == "run":
        from pipeline.status import summarise

        return summarise(config) | {"adapter": result["uri"]}
    return result


def _stage(name: str, options: argparse.Namespace) -> Callable[[Config, Any, bool], dict[str, Any]]:
    """Import a stage when its turn comes: torch and vLLM take seconds."""
    if name == "read":
        from pipeline.read import read_documents

        return lambda config, base, redo: read_documents(
            config.run_dir, config.read, config.cluster, config.max_reject_share, redo
        )
    if name == "chunk":
        from pipeline.chunk import chunk_documents

        return lambda config, base, redo: chunk_documents(
            config.run_dir, config.chunk, base.path, config.cluster, config.max_reject_share, redo
        )
    if name == "write" or name in PARTS:
        from pipeline.write import write

        return lambda config, base, redo: write(config, base, redo, PARTS if name == "write" else (name,))
    if name == "filter":
        from pipeline.filter import filter_answers

        return filter_answers
    if name == "train":
        from pipeline.train import train_adapter

        return train_adapter
    if name == "evaluate":
        from pipeline.evaluate import evaluate_adapter

        return evaluate_adapter
    if name == "report":
        from pipeline.report import write_report

        return lambda config, base, redo: write_report(config)
    from pipeline.publish import publish_adapter

    return lambda config, base, redo: publish_adapter(config, base, options.force)


def _message(error: ValueError) -> str:
    """Return what a person needs of an error, which may have crossed a Ray border."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, ValueError) else error)


if __name__ == "__main__":
    sys.exit(main())
