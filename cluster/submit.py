"""Config -> a job on a Ray cluster, its log on this terminal, its exit code as ours.

In: a TOML file inside the checkout, whose paths every node can reach. Out: the job's progress and last line. The code
travels as the job's working_dir; models, data and results do not. A second submission of the same config goes on where
the first one stopped, whatever stopped it.
"""

import asyncio
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.config import read_settings
from pipeline.stage import CODE, NOT_CODE

DASHBOARD = "http://127.0.0.1:8265"
POLL_S = 2.0
PATHS = (
    "run_dir",
    "corpora",
    "model.path",
    "read.paths",
    "update.previous_run",
    "evaluate.questions",
    "evaluate.unrelated",
    "evaluate.embedding_model",
    "publish.registry",
)


def submit(
    config: str, arguments: list[str], overrides: list[str], address: str | None, stop_on_interrupt: bool = False
) -> int:
    """Run the pipeline as a job and return its exit code; after Ctrl-C the job goes on unless told otherwise.

    `arguments` are further ones of `python -m pipeline run`.

    Raises ValueError if there is no such cluster, if it cannot be reached any more, for paths that stay behind, and if
    another job is at work on the run directory: two would undo each other.
    """
    path = Path(config).resolve()
    if not path.is_relative_to(CODE) or path.relative_to(CODE).parts[0] in NOT_CODE:
        raise ValueError(
            f"{config} does not travel to the cluster: only what is in {CODE}, without {', '.join(NOT_CODE)}; move it"
        )
    settings = read_settings(path, overrides)
    refuse_relative_paths(settings)
    client, run_dir = connect(address), settings["run_dir"]
    for other in client.list_jobs():
        if (other.metadata or {}).get("run_dir") == run_dir and not other.status.is_terminal():
            raise ValueError(
                f"job {other.submission_id} is at work on run_dir = {run_dir!r}; ray job logs --follow "
                f"{other.submission_id} shows it, ray job stop {other.submission_id} stops it"
            )
    command = ["python", "-m", "pipeline", "run", str(path.relative_to(CODE)), *arguments, *overrides]
    job = client.submit_job(
        entrypoint=shlex.join(command),
        runtime_env={"working_dir": str(CODE), "excludes": NOT_CODE},
        metadata={"run_dir": run_dir},
    )
    print(f"job {job}: ray job logs --follow {job}", file=sys.stderr)
    try:
        asyncio.run(_follow(client, job))
    except (OSError, RuntimeError) as error:
        print(f"\nno more of the log ({error}); waiting for the job", file=sys.stderr)
    except KeyboardInterrupt:
        if not stop_on_interrupt:
            print(f"\nthe job goes on; to stop it: ray job stop {job}", file=sys.stderr)
            return 130
        client.stop_job(job)
    # The log may end before the job, and a job that was told to stop takes a while.
    try:
        while not (status := client.get_job_info(job)).status.is_terminal():
            time.sleep(POLL_S)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the job server does not say how job {job} stands ({error}); when it answers again: ray job status {job}"
        ) from None
    if status.status != JobStatus.SUCCEEDED:
        print(f"job {job}: {status.status}: {status.message}", file=sys.stderr)
    return 0 if status.status == JobStatus.SUCCEEDED else status.driver_exit_code or 1


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the cluster's job server; ValueError if nobody answers or the token is refused."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise ValueError(
            f"no Ray job server at {address} ({str(error).splitlines()[0]}); give --address, and for a cluster with "
            "token authentication set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None


def refuse_relative_paths(data: dict[str, Any]) -> None:
    """Raise ValueError for a path that would mean another place on the cluster than here."""
    for name in PATHS:
        section, _, key = name.rpartition(".")
        value = (data.get(section, {}) if section else data).get(key)
        for path in value if isinstance(value, list) else [value]:
            if path and "://" not in path and not os.path.isabs(os.path.expanduser(path)):
                raise ValueError(
                    f"{name} = {path!r} is relative, and a job has a folder of its own on the cluster; give a URI such "
                    "as s3://bucket/..., or an absolute path that every node has"
                )


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
