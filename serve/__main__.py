"""`python -m serve CONFIG [section.key=value ...]`: the endpoint on this machine, or on the cluster that it joins.

In: the TOML file of the pipeline. Out: an OpenAI endpoint for the base model and every adapter of the registry, until
Ctrl-C. Exit code 0, or 2 for bad input (one message, no traceback).
"""

import argparse
import os
import signal
import sys

from pipeline.config import load_config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    options = parser.parse_args(arguments)
    # What is said once goes for every process: in-process engines are the pipeline's, chatty ones nobody's.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        config = load_config(options.config, options.overrides)
        from pipeline.base_model import load_base_model
        from pipeline.resources import demands, refuse_small_machine

        base = load_base_model(config.model.path)
        refuse_small_machine(config.cluster, [demands(config)[0]._replace(stage="serve")])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from ray import serve

    from pipeline.stage import ray_session, start_ray
    from serve.app import build_app
    from serve.registry import Registry

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = config.serve
    with ray_session():
        start_ray(config.cluster)
        serve.start(http_options={"host": settings.host, "port": settings.port}, proxy_location="EveryNode")
        serve.run(build_app(config), name="distillery")
        names = [version.name for version in Registry(config.publish.registry).live(base.revision)]
        print(f"serving {config.base_name} and {len(names)} adapters on http://{settings.host}:{settings.port}")
        print(f'ask one: python -m serve.ask {names[0] if names else config.base_name} "QUESTION"', flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            serve.delete("distillery")  # on a cluster that was joined, other applications go on
    return 0


if __name__ == "__main__":
    sys.exit(main())
