"""What each arm is asked, what becomes of a judge that does not grade, and of a grade that cannot be read."""

import contextlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import held_out
from pipeline.__main__ import main
from pipeline.arms import Replies, Reply, Task, _ask_everything, _locate, grade_remotely
from pipeline.config import Config, Judge
from pipeline.engine import Completion, EngineStats
from pipeline.evaluate import score_replies
from pipeline.prompts import judge_chat, parse_grade
from pipeline.retrieve import PassageIndex
from pipeline.schema import ANSWER
from pipeline.store import Folder, Stage
from tests.conftest import ROOT
from tests.pipeline.test_held_out import config as config


class Grader(BaseHTTPRequestHandler):
    """An endpoint that calls right what names Rosa, refuses what names Max, and says nothing of an empty reply."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        grade = "correct" if "Reply: Rosa" in asked else "wrong"
        message = {"role": "assistant", "content": f"Reason: it says so.\nGrade: {grade}"}
        choices = [] if "Reply: \n" in asked else [{"index": 0, "finish_reason": "stop", "message": message}]
        reply = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})
        self.send_response(400 if "Reply: Max" in asked else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_: object) -> None:
        pass


class Refusal(BaseHTTPRequestHandler):
    """Answers every request with 401."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def endpoint(handler: type[BaseHTTPRequestHandler]) -> Iterator[Judge]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Judge(model="grader", url=f"http://127.0.0.1:{server.server_port}/v1")
        server.shutdown()


def test_a_judge_at_an_endpoint_grades_in_the_order_of_the_replies() -> None:
    replies = ["Rosa did.", "Ida did.", "", "Rosa Lindqvist.", "Max did."] * 5
    with endpoint(Grader) as judge:
        graded = grade_remotely(judge, [judge_chat("Who built it?", ["Rosa"], reply) for reply in replies], "a key")
        assert list(map(parse_grade, graded)) == [True, False, None, True, None] * 5


def test_a_judge_that_refuses_our_key_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "corpus.toml"
    with endpoint(Refusal) as judge:
        config.write_text(
            f"""
            run_dir = "{tmp_path}/run"
            model.path = "{ROOT}/.models/smollm2-135m-instruct"
            read.paths = ["docs"]
            publish = {{ registry = "{tmp_path}/registry", name = "a" }}
            evaluate.judge = {{ model = "grader", url = "{judge.url}" }}
            """
        )
        assert main(["run", str(config)]) == 2
    assert re.search(r"evaluate\.judge: 'grader' does not grade .*401", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [config]


class Engine:
    """Says which adapter it was asked with, and whether it saw the passage; its tokens are characters."""

    stats, tokenizer, on_progress = EngineStats(), None, None
    max_model_len = 2000

    def fits(self, chat: list[dict[str, str]], reply_tokens: int) -> bool:
        return len(render(None, chat)) + reply_tokens <= self.max_model_len

    def complete(
        self,
        prompts: list[list[int]],
        seed: int,
        sampling: Any,
        max_tokens: int,
        top_k: int = 0,
        adapter: str | None = None,
    ) -> list[Completion]:
        who = Path(adapter).name if adapter else "base"
        one, top = np.ones(1, np.int32), np.zeros((1, top_k))
        said = [f"{who} {'reads' if 'The lens.' in ''.join(map(chr, prompt)) else 'alone'}" for prompt in prompts]
        return [Completion(text, "stop", one, top, top) for text in said]


def render(_: Any, chat: list[dict[str, str]]) -> list[int]:
    return list(map(ord, chat[-1]["content"]))


@pytest.fixture
def task(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """One question, which is also asked as an unrelated one, and two adapters."""
    for module in ("engine", "answer"):
        monkeypatch.setattr(f"pipeline.{module}.render_chat", render)
    peft = Folder(str(tmp_path / "peft"))
    peft.write_json("adapter_config.json", {})
    asked = [held_out.TestQuestion("1", "How heavy is lens number 1 of Orrin?", ["7"], "The lens.")]
    stage = Stage(config.run_dir, "evaluate")
    return Task(config, stage, asked, asked, {"adapter": peft, "sft": peft}, [])


def test_every_arm_is_asked_as_its_name_says(task: Task) -> None:
    replies = _ask_everything(Engine(), task, "none")
    assert {arm: said[0].text for arm, said in replies.arms.items()} == {
        "closed_book": "base alone",
        "adapter": "adapter alone",
        "sft": "sft alone",
        "retrieval": "base reads",
        "adapter_retrieval": "adapter reads",
        "gold_passage": "base reads",
    }
    for said, how in ((replies.general, "alone"), (replies.unrelated, "alone"), (replies.reading, "reads")):
        assert {arm: texts[0] for arm, texts in said.items()} == {
            "closed_book": f"base {how}",
            "adapter": f"adapter {how}",
        }


def test_a_grade_for_which_there_is_no_room_is_none(task: Task) -> None:
    evaluate = task.config.evaluate.model_copy(update={"judge": Judge(), "retrieval": False})
    config = task.config.model_copy(update={"evaluate": evaluate})
    long = task.questions[0]._replace(id="2", answers=["seven " * 400])
    task = task._replace(config=config, questions=[*task.questions, long])
    asked: list[int] = []
    engine = Engine()
    complete = engine.complete

    def count(prompts: list[list[int]], *arguments: Any, **options: Any) -> list[Completion]:
        asked.append(max(map(len, prompts)))
        replies = complete(prompts, *arguments, **options)
        return [reply._replace(text="Grade: correct") for reply in replies]

    engine.complete = count
    assert _ask_everything(engine, task, "none").grades["adapter"] == [True, None]
    assert max(asked) <= engine.max_model_len


def test_a_context_that_is_not_of_the_corpus_blames_no_document() -> None:
    texts = ["The Kestrel Mill on the River Arden was built by Rosa Lindqvist.", "The Orrin Lens is on Mount Sabel."]
    columns = {"passage_id": ["0", "1"], "source": ["mill.md", "lens.md"], "heading": ["", ""], "text": texts}
    index = PassageIndex.build(pa.table(columns))
    question = held_out.TestQuestion("1", "Who built it?", ["Rosa"], f"Some words before. {texts[0]}")
    assert _locate(question, index).document == "mill.md"
    other = "The lens of a human eye is a clear part that bends light, and with age its shape changes less and less."
    assert _locate(question._replace(context=other), index) == question._replace(context=other)


def test_a_grade_that_cannot_be_read_counts_as_wrong() -> None:
    grades = [parse_grade(text) for text in ("Reason: yes.\nGrade: correct", "It is fine.", "Grade: wrong")]
    questions = [held_out.TestQuestion(str(number), "Who built it?", ["Rosa"], "Rosa built it.") for number in range(3)]
    said = {"adapter": [Reply("Rosa", 1.0)] * 3}
    replies = Replies(questions, said, ANSWER.empty_table(), {"adapter": grades}, {}, {}, {}, {})
    assert grades == [True, None, False]
    assert score_replies(replies)["adapter"]["judge"] == [1.0, 0.0, 0.0]
