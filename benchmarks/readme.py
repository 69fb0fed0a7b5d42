"""The table of measured figures, made from `benchmarks/results/`.

    python -m benchmarks.readme

In: the result files. Out: benchmarks/README.md with one row for every figure that was asked for, met or not. A test
holds that the two agree.
"""

import json
from typing import Any

from benchmarks.record import ROOT
from pipeline.config import Config

README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- measured: python -m benchmarks.readme -->", "<!-- end of measured -->"


def main() -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


def with_table(readme: str) -> str:
    """Return `readme` with the table as the result files have it."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} has no place for the table; put {BEGIN} and {END} where it belongs")
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def table() -> str:
    """Return the Markdown table, in the order of the files' names."""
    lines = ["| result | figure | measured | asked for | |", "| --- | --- | --- | --- | --- |"]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        mark = " (uncommitted changes)" if result["dirty"] else ""
        name = f"`{path.stem}`, {result['date']}{mark}"
        for claim in result["claims"]:
            met = "met" if claim["met"] else "**not met**"
            figures = f"{_short(claim['value'])} | {_sign(claim)}{_short(claim['aim'])}"
            lines.append(f"| {name} | {_words(claim['name'])} | {figures} | {met} |")
            name = ""
    return "\n".join([*lines, ""])


def _words(name: str) -> str:
    """Put spaces for the underscores of a figure's name, but for those of a setting in it."""
    words = (word if word.partition(".")[0] in Config.model_fields else word.replace("_", " ") for word in name.split())
    return " ".join(words)


def _sign(claim: dict[str, Any]) -> str:
    """Say on which side of the aim the value should lie, as what was met tells; one that is the aim may be either."""
    value, aim = claim["value"], claim["aim"]
    if value is None or value == aim:
        return ""
    return "\u2265 " if (value > aim) == claim["met"] else "\u2264 "


def _short(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
