"""`python -m cluster submit|check CONFIG [section.key=value ...]`: run on a Ray cluster, or see whether one will do.

In: the TOML file of the pipeline. Out: `submit` has the job's log and exit code; `check` one line per thing that is
missing, exit code 2 if there is any.
"""

import argparse
import sys

from pipeline.config import load_config, load_configs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["submit", "check"])
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--address", help="submit: the job server, http://HEAD:8265; check: the cluster, HEAD:6379")
    parser.add_argument("--redo", action="store_true", help="submit: as of python -m pipeline run")
    parser.add_argument("--force", metavar="REASON", help="submit: as of python -m pipeline run")
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job, not only its log")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.command == "submit":
            from cluster.submit import submit

            load_configs(options.config, options.overrides, names=["corpus"])  # those of the corpora are on the nodes
            of_run = ["--redo"] * options.redo + (["--force", options.force] if options.force else [])
            return submit(options.config, of_run, options.overrides, options.address, options.stop_on_interrupt)
        from cluster.check import check

        findings = check(load_config(options.config, options.overrides), options.address)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for finding in findings:
        print(f"missing: {finding}", file=sys.stderr)
    if not findings:
        print("everything is there", file=sys.stderr)
    return 2 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
