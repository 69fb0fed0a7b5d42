"""The report of a small run made by hand: what stands in it, what it escapes, what it does without, how it looks."""

import contextlib
import json
import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from selenium import webdriver

from pipeline.config import Config, load_config
from pipeline.report import EXAMPLES, PASSAGE_CHARS, WORST_DOCUMENTS, choose_examples, excerpt, write_report
from pipeline.schema import DOCUMENT, Document, Rejected, to_table
from pipeline.status import STAGES, read_status, stages_of
from pipeline.store import LINE, Folder

HOSTILE = "<script>alert('mill')</script><img src=http://evil.example/a.png> & $x^2$"
ARMS = {"closed_book": 0.125, "adapter": 0.5, "adapter_retrieval": 0.625, "gold_passage": 0.875}
STATS = {
    "output_tokens": 4321,
    "answer_tokens": 4321,
    "engine_seconds": 10.0,
    "prompt_tokens": 100,
    "cached_tokens": 50,
    "passages": 4,
    "passages_full": 3,
    "words": 10,
    "words_told": 7,
    "tail_mass_sum": 432.1,
}
TRAINING = {"steps": 40, "tokens": 98765, "seconds": 100.0, "tokens_per_s": 987.6}


def scores(metric: str, by: float) -> dict[str, dict[str, Any]]:
    return {
        arm: {metric: by * value, f"{metric}_interval": [by * value - 0.05, by * value + 0.05]}
        for arm, value in ARMS.items()
    }


def evaluation() -> dict[str, Any]:
    match, f1 = scores("substring_match", 1), scores("token_f1", 0.5)
    documents = [f"/corpus/{number:02d}-{HOSTILE}" for number in range(WORST_DOCUMENTS + 3)]
    return {
        "questions": 16,
        "questions_from": "file",
        "metric": "substring_match",
        "scores": {arm: match[arm] | f1[arm] for arm in ARMS},
        "comparisons": [
            {"arm": "adapter", "over": "closed_book", "difference": 0.375, "interval": [0.11, 0.63], "p": 0.01}
        ],
        "gap_closed": 0.5,
        "kl_to_teacher": {"closed_book": 1.25, "adapter": 0.75},
        "kl_to_teacher_interval": {"closed_book": [1.1, 1.4], "adapter": [0.71, 0.79]},
        "kl_comparisons": [{"arm": "adapter", "over": "sft", "difference": -0.2, "interval": [-0.3, -0.1]}],
        "calibration": {
            "adapter": {"expected_error": 0.21, "bins": [{"confidence": 0.7, "accuracy": 0.4, "count": 16}]}
        },
        "by_kind": [{"kind": "fact", "questions": 16, **ARMS}],
        "by_document": [{"document": document, "questions": 1, **ARMS} for document in documents],
        "lost": {
            "kl_to_base": 0.031,
            "prompts": 48,
            "general_questions": {
                "count": 64,
                "closed_book": 0.75,
                "adapter": 0.5,
                "difference_interval": [-0.4, -0.1],
            },
            "refusal": {"count": 24, "closed_book": 0.25, "adapter": 0.25},
        },
    }


def answer(number: int) -> dict[str, Any]:
    right = float(number % 2)
    return {
        "id": str(number),
        "question": f"Who built mill {number}? {HOSTILE}",
        "answers": ["Rosa Lindqvist", HOSTILE],
        "context": f"{'The mill stands by the river. ' * 100}It was built by Rosa Lindqvist. {HOSTILE}",
        "kind": "fact",
        "document": f"/corpus/{HOSTILE}",
        **{arm: {"reply": f"{HOSTILE} said {arm}", "substring_match": right, "token_f1": 0.2} for arm in ARMS},
        **(
            {}
            if right
            else {"lineage": [{"question": "Who built it?", "answer": f"Rosa {HOSTILE}"}] * (number // 2 % 2)}
        ),
    }


def make_run(tmp_path: Path, report: dict[str, Any] | None, *overrides: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(
        f'run_dir = "{tmp_path}/run"\n[model]\npath = "models/tiny"\n[read]\npaths = ["corpus"]\n'
        f'[publish]\nregistry = "registry"\nname = "mills"\n'
    )
    config = load_config(path, overrides)
    stages = stages_of(config)
    for name, stage in stages.items():
        # As in a run: the stage from whose rows it is made, and what it decided.
        source = LINE[LINE.index(name) - 1] if name in LINE[1:] else None
        settings = {"input": source and stages[source].require()["data_digest"]}
        stage.open(settings | config.model_dump(include={name} & {"train", "answer"}))
        reasons: list[Any] = ["off_passage", "off_passage", "unparsable"] if name == "question" else []
        rejected = [Rejected(name, str(number), reason, "") for number, reason in enumerate(reasons)]
        rows = [Document("d", f"/corpus/{HOSTILE}", HOSTILE, HOSTILE)] if name in ("read", "dedup") else []
        stats = STATS if name in ("question", "answer", "filter", "general") else {}
        stage.commit("0", [to_table(rows, DOCUMENT)], rejected, len(rows) + len(rejected), stats)
        extra = {"training": TRAINING} if name in ("train", "baseline-sft") else {}
        stage.close(450.0, report if report and name == "evaluate" else extra)
    run = Folder(config.run_dir)
    history = [{"step": step, "loss": 2.0 - step / 40, "lr": 1e-3} for step in range(1, 41)]
    (run / "train").write_json("history.json", history)
    if report is not None:
        lines = [json.dumps(answer(number), ensure_ascii=False) for number in range(16)]
        (run / "evaluate").write_bytes("answers.jsonl", "\n".join([*lines, ""]).encode())
    return config


def page(config: Config) -> str:
    return Path(write_report(config)["report"]).read_text()


def text(html: str) -> str:
    """What a reader sees between the tags, white space folded."""
    return " ".join(re.sub(r"<[^>]+>|&nbsp;", " ", html[html.index("<body>") :]).split())


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [
        ({}, "Training never saw them."),
        ({"trained_on": 0}, "Training never saw them."),
        ({"trained_on": 3}, "3 of them nearly repeat a question that was trained on"),
        ({"trained_on": None}, "Whether training saw them is not known"),
    ],
)
def test_it_says_whether_training_saw_the_questions(tmp_path: Path, trained_on: dict[str, Any], said: str) -> None:
    assert said in text(page(make_run(tmp_path, evaluation() | trained_on)))


def test_what_matters_is_in_it(tmp_path: Path) -> None:
    seen = text(page(make_run(tmp_path, evaluation(), "cluster.price_per_hour=2.0", 'evaluate.baselines=["sft"]')))
    for wanted in (
        "50 % of the gap",
        "Closed book 0.12 [0.07, 0.17]",
        "Adapter 0.50 [0.45, 0.55]",
        "Adapter against closed book +0.38 [0.11, 0.63] better",
        "General questions common knowledge: share answered right 64 0.75 0.50 \u22120.25 [\u22120.40, \u22120.10]",
        "0.031 nats per token away from the base model",
        "Adapter: off by 0.21",
        "1.25 \u2192 0.75",
        "Adapter 0.75 [0.71, 0.79]",
        "Against the fine-tuned one: \u22120.20 [\u22120.30, \u22120.10].",
        "question off_passage 2 66.7 %",
        "Passages asked in this run that got all their questions 75 %",
        "4,321 432",
        "baseline-sft \u2013 \u2013 \u2013 98,765 988 7 min 30 s",
        "3 documents with better scores are left out",
        "has 8 right and 8 wrong. Shown are 6 wrong and 6 right ones",
        "Training rows that should have taught it Who built it? Rosa",
        "share no word with the question, or none were trained on",
    ):
        assert wanted in seen, wanted
    hours = 450 * (len(STAGES) + 1) / 3600
    assert f"At 2.00 an hour these calls cost {2 * hours:.2f}" in seen


def test_nothing_from_outside_runs_or_loads(tmp_path: Path) -> None:
    html = page(make_run(tmp_path, evaluation()))
    assert "&lt;script&gt;alert(&#39;mill&#39;)" in html
    assert not re.search(r"<script|<img|<link|<iframe|@import|url\((?!#)", html)
    for tag in re.findall(r"<[^>]+>", html):
        assert not re.search(r"""\son\w+=|(?:src|href)\s*=\s*["']?[^"'#\s]""", tag), tag
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert targets and {first or second for first, second in targets} <= set(ids)
    assert html.count("<svg") == html.count('role="img" aria-label="') == html.count("<title>") - 1 == 4
    assert all("<th" in table for table in re.findall(r"<table>.*?</table>", html, re.DOTALL))


def test_the_data_behind_it(tmp_path: Path) -> None:
    config = make_run(tmp_path, evaluation())
    write_report(config)
    data = json.loads(Path(config.run_dir, "report.json").read_text())
    assert data["evaluation"].items() >= evaluation().items()
    assert data["arms"] == list(ARMS)
    assert len(data["history"]) == 40
    assert data["rejected"][0] == {"stage": "question", "reason": "off_passage", "rows": 2, "share": 2 / 3}
    assert data["examples"]["wrong"][0] == answer(0)


def test_a_run_without_questions_says_so(tmp_path: Path) -> None:
    config = make_run(tmp_path, None)
    (Folder(config.run_dir) / "train").delete_file("history.json")
    seen = text(page(config))
    assert "Not measured" in seen and "off_passage" in seen
    for heading in ("What was lost", "Where it is right", "Calibration", "Examples", "Loss", "of the gap"):
        assert heading not in seen, heading


OPTIONAL = [key for key in evaluation() if key not in ("scores", "questions")]


@pytest.mark.parametrize("absent", [*((key,) for key in OPTIONAL), OPTIONAL])
def test_every_optional_part_may_be_absent(tmp_path: Path, absent: list[str]) -> None:
    report = {key: value for key, value in evaluation().items() if key not in absent}
    assert "Adapter 0.50 [0.45, 0.55]" in text(page(make_run(tmp_path, report)))


@pytest.mark.parametrize(
    ("share", "said"),
    [(None, "no gap to measure the adapter by"), (-0.25, "worse than the base model alone")],
)
def test_no_gap_and_a_worse_adapter_are_said(tmp_path: Path, share: float | None, said: str) -> None:
    assert said in text(page(make_run(tmp_path, evaluation() | {"gap_closed": share})))


def test_questions_that_the_model_wrote_are_said_to_be_so(tmp_path: Path) -> None:
    seen = text(page(make_run(tmp_path, evaluation() | {"metric": "token_f1", "questions_from": "generated"})))
    assert "16 questions, which the base model wrote" in seen and "token f1 without a passage" in seen


def test_a_run_under_way_says_what_is_left(tmp_path: Path) -> None:
    config = make_run(tmp_path, None)
    stage = stages_of(config)["dedup"]
    stage.folder.delete_file("manifest.json")
    (stage.folder / "units").delete_file("0.json")
    status = read_status(config)["stages"]
    assert (status["read"]["state"], status["dedup"]["state"]) == ("complete", "unfinished")
    assert status["dedup"]["units_left"] == 1


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    config = make_run(tmp_path, None)
    (Folder(config.run_dir) / "train").delete_file("manifest.json")
    with pytest.raises(ValueError, match=r"stage train .* is not complete"):
        write_report(config)


def test_examples_are_evenly_spaced() -> None:
    rows = [{"id": number, "adapter": {"token_f1": number / 100}} for number in range(100)]
    chosen = choose_examples(rows, "token_f1")
    assert (chosen["num_right"], chosen["num_wrong"]) == (50, 50)
    assert [row["id"] for row in chosen["wrong"]] == [0, 9, 19, 29, 39, 49]
    assert len(chosen["right"]) == EXAMPLES
    assert choose_examples([], "token_f1")["right"] == []


def test_an_excerpt_is_cut_around_the_answer() -> None:
    passage = "a" * 3000 + " ROSA " + "b" * 3000
    before, found, after = excerpt(passage, ["nobody", "Rosa"])
    assert found == "ROSA" and before.startswith("\u2026 a") and after.endswith("b \u2026")
    assert len(before + found + after) <= PASSAGE_CHARS + 4
    assert excerpt("short", ["nobody"]) == ("", "", "short")
    assert excerpt("short", ["SHORT", ""]) == ("", "short", "")


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """No sideways scrolling, every chart has a size, and there is something to see."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not installed (Debian: apt install chromium chromium-driver)")
    report = write_report(make_run(tmp_path, evaluation()))["report"]
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox"):
        options.add_argument(argument)
    with contextlib.closing(webdriver.Chrome(options, webdriver.ChromeService(chromedriver))) as browser:
        for width in (400, 1200):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(f"file://{report}")
            assert not browser.execute_script("return document.documentElement.scrollWidth > innerWidth")
            boxes = browser.execute_script(
                "return [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().toJSON())"
            )
            assert len(boxes) == 4
            assert all(box["width"] > 100 and box["height"] > 80 and box["right"] <= width for box in boxes)
            assert imread(BytesIO(browser.get_screenshot_as_png())).std() > 0.05
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
