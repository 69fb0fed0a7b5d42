"""Which settings matter? One at a time around a config, on the same questions, with several seeds of the training.

    python -m benchmarks.ablations CONFIG [KEY=VALUE ...] [--name NAME] [--data FILE.jsonl --passages 10] \
        --vary train.lora.rank=8,128 [--vary ...]

The config's passages, questions and answers are written once. Every variation starts from a copy of them, in which only
the stages that its setting decides are done again. Stopped, it goes on where it was. What limits it: how many questions
there are, and the spread over the seeds, which are those of the first weights and of the order of the samples.
"""

from math import nan
from statistics import mean
from typing import Any

from benchmarks.injection_quality import name_data, set_parser, use_set
from benchmarks.record import claim, describe_run, run_branch, save, spread, write_once
from pipeline.config import load_config

AS_GIVEN = "as given"


def main() -> None:
    parser = set_parser(__doc__)
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="a setting to vary; a list in brackets is one value",
    )
    parser.add_argument("--seeds", type=int, default=2, help="so many seeds of the training")
    options = parser.parse_intermixed_args()
    overrides = use_set(options)
    config = load_config(options.config, overrides)
    changes = [AS_GIVEN]
    for varied in options.vary:
        key, _, values = varied.partition("=")
        changes += [f"{key}={value}" for value in ([values] if values.startswith("[") else values.split(","))]
    for change in changes[1:]:  # a wrong one now, not after hours
        load_config(options.config, [*overrides, change])
    write_once(options.config, overrides)
    runs: dict[str, list[dict[str, Any]]] = {}
    print_head()
    for change in changes:
        own = [] if change == AS_GIVEN else [change]
        runs[change] = [
            figures(run_branch(options.config, overrides, change, *own, seed=seed)[1]) for seed in range(options.seeds)
        ]
        print_row(change, runs[change])
    save(
        options.name,
        {
            "benchmark": "ablations",
            **describe_run(config),
            "data": name_data(options, config),
            "seeds": options.seeds,
            "runs": runs,
            "claims": make_claims(runs),
        },
    )


def figures(run: dict[str, Any]) -> dict[str, Any]:
    """Return what is compared of a run's summary."""
    return {
        "gap_closed": run["gap_closed"],
        "substring_match": run["scores"]["adapter"]["substring_match"],
        "token_f1": run["scores"]["adapter"]["token_f1"],
        "kl_to_teacher": run["kl_to_teacher"]["adapter"],
        "adapter_retrieval": run["scores"].get("adapter_retrieval", {}).get("substring_match"),
        "kl_to_base": run["lost"]["kl_to_base"],
        "general_questions": run["lost"]["general_questions"]["adapter"],
        "questions_per_passage": run["questions_per_passage"],
        "answers": run["counts"]["answers"],
        "bytes_per_answer_token": run["bytes_per_answer_token"],
        "tail_mass": run["tail_mass"],
        "train_tokens": run["training"]["tokens"],
        "train_seconds": run["training"]["seconds"],
    }


def print_head() -> None:
    print(
        f"{'setting':30} {'gap closed':>22} {'substring':>9} {'retrieval':>9} {'KL teacher':>10} {'KL base':>8} "
        f"{'general':>8} {'train s':>8}"
    )


def print_row(change: str, runs: list[dict[str, Any]]) -> None:
    gap = spread([run["gap_closed"] for run in runs], 3)
    middle = {name: mean(run[name] for run in runs) for name in runs[0] if runs[0][name] is not None}
    print(
        f"{change:30} {gap['median']:.3f} [{gap['min']:.3f}, {gap['max']:.3f}]".ljust(53)
        + f" {middle['substring_match']:9.3f} {middle.get('adapter_retrieval', nan):9.3f}"
        f" {middle['kl_to_teacher']:10.3f} {middle.get('kl_to_base', nan):8.3f}"
        f" {middle['general_questions']:8.3f} {middle['train_seconds']:8.0f}",
        flush=True,
    )


def make_claims(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For every setting: the config's own value reaches nine tenths of what the best value reaches."""

    def gap(change: str) -> float:
        return mean(run["gap_closed"] for run in runs[change])

    keys = dict.fromkeys(change.partition("=")[0] for change in runs if change != AS_GIVEN)
    claims = []
    for key in keys:
        best = max(gap(change) for change in runs if change.partition("=")[0] in (AS_GIVEN, key))
        claims.append(claim(f"given {key} over best", round(gap(AS_GIVEN) / best, 3) if best > 0 else None, 0.9))
    return claims


if __name__ == "__main__":
    main()
