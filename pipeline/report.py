"""A complete run -> one page to read, print and pass on, and the figures behind it.

In: the run directory. Out: `RUN/report.html`, which needs no script, no network and no other file, and
`RUN/report.json` with all that it shows. What documents and models say is untrusted: Jinja escapes it, and no chart
holds any of it. A part of the run that was not measured has no section.
"""

import json
import os
import re
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from pipeline.config import Config
from pipeline.score import ARMS, RIGHT
from pipeline.status import stages_of, summarise
from pipeline.store import Folder

METRICS = {
    "substring_match": ("Substring match", "share of replies that hold an accepted answer"),
    "token_f1": ("Token F1", "words that reply and accepted answer share"),
    "judge": ("Judge", "share of replies that the judge model calls right"),
}
WORST_DOCUMENTS = 20
EXAMPLES = 6  # of the right answers, and as many of the wrong ones
PASSAGE_CHARS = 1200
CURVE_POINTS = 500

INK, SOFT, LINE, BAR = "#1d2433", "#5b6579", "#d8dde6", "#c6cdd9"
MARK, PALE_MARK = "#0b6b5d", "#7db5ab"
WIDTH = 320  # of a chart, in points: what a phone shows at the size of the text around it


def write_report(config: Config) -> dict[str, Any]:
    """Write both files and return where the page is; ValueError if a stage is not complete."""
    data = collect(config)
    page = _environment().get_template("report.html").render(data | {"charts": draw_charts(data)})
    run = Folder(config.run_dir)
    run.write_json("report.json", data)
    run.write_bytes("report.html", page.encode("utf-8", "replace"))
    return {"report": str(run / "report.html")}


def collect(config: Config) -> dict[str, Any]:
    """Return everything that the page shows, as JSON."""
    summary = summarise(config)
    manifests = {name: stage.require() for name, stage in stages_of(config).items()}
    run = Folder(config.run_dir)
    evaluation = manifests["evaluate"]
    stages = [_stage_figures(name, manifest) for name, manifest in manifests.items()]
    hours = sum(stage["seconds"] for stage in stages) / 3600
    price = config.cluster.price_per_hour
    return {
        "name": config.publish.name,
        "base_model": Path(config.model.path).name,
        "run_dir": str(run),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": summary,
        "evaluation": evaluation,
        "arms": [arm for arm in ARMS if arm in evaluation.get("scores", {})],
        "documents_below": _common_folder([row["document"] for row in evaluation.get("by_document", [])]),
        "history": (run / "train").read_json("history.json") or [],
        "settings": {name: manifests[name]["settings"][name] for name in ("train", "answer")},
        "stages": stages,
        "rejected": [
            {"stage": name, "reason": reason, "rows": rows, "share": rows / max(1, manifest["rows_in"])}
            for name, manifest in manifests.items()
            for reason, rows in sorted(manifest["rejected"].items(), key=lambda item: -item[1])
        ],
        "cost": {"hours": hours, "money": None if price is None else round(hours * price, 2), "price_per_hour": price},
        "examples": choose_examples(_read_answers(run / "evaluate"), evaluation.get("metric", "substring_match")),
    }


def _stage_figures(name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    stats, training = manifest["stats"], manifest.get("training", {})
    written, busy = stats.get("output_tokens"), stats.get("engine_seconds")
    return {
        "stage": name,
        "rows_in": manifest["rows_in"],
        "rows_out": manifest["rows_out"],
        "rejected": sum(manifest["rejected"].values()),
        "tokens": training.get("tokens", written),
        "tokens_per_s": training.get("tokens_per_s", written / busy if written and busy else None),
        "seconds": manifest["seconds"],
    }


def _common_folder(sources: list[str]) -> str:
    return os.path.commonprefix(sources).rpartition("/")[0]  # noqa: RUF071 (commonpath breaks URIs)


def _read_answers(folder: Folder) -> list[dict[str, Any]]:
    try:
        lines = folder.read_bytes("answers.jsonl").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def choose_examples(rows: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Return evenly spaced right and wrong answers of the adapter, and how many of each there are."""
    right = [row for row in rows if row["adapter"][metric] >= RIGHT]
    wrong = [row for row in rows if row["adapter"][metric] < RIGHT]

    def pick(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [rows[int(n)] for n in np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows)))]

    return {"num_right": len(right), "num_wrong": len(wrong), "right": pick(right), "wrong": pick(wrong)}


def draw_charts(data: dict[str, Any]) -> dict[str, Any]:
    """Return the SVG of every chart that there is data for."""
    evaluation, arms = data["evaluation"], data["arms"]
    charts: dict[str, Any] = {"scores": {}, "calibration": {}, "loss": None}
    settings: dict[Any, Any] = {"svg.fonttype": "none", "font.size": 10.8, "text.color": INK, "text.parse_math": False}
    with rc_context(settings | dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), SOFT)):
        for metric in METRICS:
            scored = {arm: evaluation["scores"][arm] for arm in arms if metric in evaluation["scores"][arm]}
            if scored:
                charts["scores"][metric] = draw_scores(scored, metric)
        for arm in filter(evaluation.get("calibration", {}).__contains__, arms):
            charts["calibration"][arm] = draw_calibration(arm, evaluation["calibration"][arm])
        if data["history"]:
            charts["loss"] = draw_loss(data["history"])
    return charts


def draw_scores(scores: dict[str, dict[str, Any]], metric: str) -> Markup:
    """One bar per arm with its 95 % interval; its name and its figures stand above it."""
    rows, foot = 34 * len(scores), 18  # points
    figure = Figure((WIDTH / 72, (rows + foot) / 72))
    axes = figure.add_axes((0.003, foot / (rows + foot), 0.994, rows / (rows + foot)))
    halo = [withStroke(linewidth=3.2, foreground="white")]
    ticks = np.linspace(0, 1, 5)
    said = []
    for row, (arm, score) in enumerate(scores.items()):
        value, interval = score[metric], score.get(f"{metric}_interval")
        bar, weight = row + 0.72, "bold" if arm == "adapter" else "normal"
        axes.vlines(ticks, row + 0.53, row + 0.91, color=LINE, linewidth=0.6, zorder=0, clip_on=False)
        axes.barh(bar, value, 0.38, color={"adapter": MARK, "adapter_retrieval": PALE_MARK}.get(arm, BAR))
        if interval:
            axes.hlines(bar, *interval, color=INK, linewidth=1.2, path_effects=halo, clip_on=False)
            axes.vlines(interval, bar - 0.09, bar + 0.09, color=INK, linewidth=1.2, path_effects=halo, clip_on=False)
        axes.text(0, row + 0.43, _arm(arm), weight=weight)
        axes.text(1, row + 0.43, _score(value, interval), weight=weight, ha="right")
        said.append(f"{_arm(arm)} {_score(value, interval)}")
    axes.set(xlim=(0, 1), ylim=(len(scores), 0), xticks=ticks, yticks=[], xticklabels=[f"{tick:g}" for tick in ticks])
    # The outer labels stay inside the figure.
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    return _svg(figure, f"{METRICS[metric][0]}: {'; '.join(said)}")


def draw_calibration(arm: str, measured: dict[str, Any]) -> Markup:
    """Share right over confidence, one dot per bin."""
    confidence, right = ([row[name] for row in measured["bins"]] for name in ("confidence", "accuracy"))
    figure = Figure((140 / 72, 130 / 72))
    axes = figure.add_axes((0.13, 0.23, 0.82, 0.72))
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
    axes.plot(confidence, right, "o-", color=MARK, linewidth=1.2, markersize=4.5, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    _plain(axes, "confidence")
    said = "; ".join(f"confidence {x:.2f}, right {y:.2f}" for x, y in zip(confidence, right, strict=True))
    return _svg(figure, f"Calibration of {_arm(arm)}: {said}")


def draw_loss(history: list[dict[str, Any]]) -> Markup:
    """Loss of every step, thinned out, and its running mean over a twentieth of the steps."""
    loss = np.array([row["loss"] for row in history])
    steps = np.array([row["step"] for row in history])
    window = max(1, len(loss) // 20)
    edges = np.concatenate([[0.0], np.cumsum(loss)])
    high = np.arange(1, len(loss) + 1)
    low = np.maximum(0, high - window)
    mean = (edges[high] - edges[low]) / (high - low)
    shown = np.unique(np.linspace(0, len(loss) - 1, CURVE_POINTS).astype(int))
    figure = Figure((WIDTH / 72, 170 / 72))
    axes = figure.add_axes((0.085, 0.2, 0.905, 0.77))
    axes.plot(steps[shown], loss[shown], color=BAR, linewidth=0.9)
    axes.plot(steps[shown], mean[shown], color=MARK, linewidth=1.8)
    axes.set(xlim=(0, max(1, int(steps[-1]))), ylim=(0, max(1e-9, float(loss.max())) * 1.05))
    axes.locator_params(nbins=5)
    _plain(axes, "optimiser step")
    return _svg(figure, f"Training loss, nats per token: {mean[0]:.2f} at first, {mean[-1]:.2f} at the end")


def _plain(axes: Any, x_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=9.5, labelpad=3)
    axes.tick_params(length=0, labelsize=9, pad=4)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def _svg(figure: Figure, label: str) -> Markup:
    """Return the figure as one element: sized by the page, said in words, with no id that another chart has too."""
    file = StringIO()
    nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox, "matplotlib wrote no viewBox"
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", body)
    body = body.replace("xlink:href", "href")
    return Markup(f'<svg {viewbox[0]} role="img" aria-label="{escape(label)}"><title>{escape(label)}</title>{body}')


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"ARMS": ARMS, "METRICS": METRICS, "WORST_DOCUMENTS": WORST_DOCUMENTS, "RIGHT": RIGHT}
    environment.filters |= {
        "arm": _arm,
        "below": lambda source, folder: source.removeprefix(f"{folder}/") if folder else source,
        "count": lambda value: f"{value:,}",
        "difference": lambda value: f"{value:+.2f}".replace("-", "\u2212"),
        "duration": _duration,
        "excerpt": excerpt,
        "interval": _interval,
        "percent": lambda value: f"{100 * value:.0f}\u00a0%".replace("-", "\u2212"),
    }
    return environment


def _arm(arm: str) -> str:
    return ARMS[arm][0]


def _interval(interval: list[float]) -> str:
    return "[{:.2f}, {:.2f}]".format(*interval).replace("-", "\u2212")


def _score(value: float, interval: list[float] | None) -> str:
    return f"{value:.2f} {_interval(interval)}" if interval else f"{value:.2f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def excerpt(passage: str, answers: list[str]) -> tuple[str, str, str]:
    """Return the passage as what stands before, in and after its first accepted answer, shortened around it."""
    found = (re.search(re.escape(answer), passage, re.IGNORECASE) for answer in answers if answer)
    start, end = next((match.span() for match in found if match), (0, 0))
    first = max(0, min(start - PASSAGE_CHARS // 2, len(passage) - PASSAGE_CHARS))
    last = max(end, first + PASSAGE_CHARS)
    before, after = passage[first:start], passage[end:last]
    return ("\u2026 " * (first > 0) + before, passage[start:end], after + " \u2026" * (last < len(passage)))
