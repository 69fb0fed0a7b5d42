"""What becomes of a judge that does not grade, and of a grade that cannot be read."""

import contextlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pipeline import held_out
from pipeline.__main__ import main
from pipeline.arms import Replies, Reply, grade_remotely
from pipeline.config import Judge
from pipeline.evaluate import score_replies
from pipeline.prompts import judge_chat, parse_grade
from pipeline.schema import ANSWER
from tests.conftest import ROOT


class Grader(BaseHTTPRequestHandler):
    """An endpoint that calls right what names Rosa, and has nothing to say of an empty reply."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        grade = "correct" if "Reply: Rosa" in asked else "wrong"
        message = {"role": "assistant", "content": f"Reason: it says so.\nGrade: {grade}"}
        choices = [] if "Reply: \n" in asked else [{"index": 0, "finish_reason": "stop", "message": message}]
        reply = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})
        self.send_response(200)
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
    replies = ["Rosa did.", "Ida did.", "", "Rosa Lindqvist."] * 5
    with endpoint(Grader) as judge:
        graded = grade_remotely(judge, [judge_chat("Who built it?", ["Rosa"], reply) for reply in replies], "a key")
    assert list(map(parse_grade, graded)) == [True, False, None, True] * 5


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


def test_a_grade_that_cannot_be_read_counts_as_wrong() -> None:
    grades = [parse_grade(text) for text in ("Reason: yes.\nGrade: correct", "It is fine.", "Grade: wrong")]
    questions = [held_out.TestQuestion(str(number), "Who built it?", ["Rosa"], "Rosa built it.") for number in range(3)]
    said = {"adapter": [Reply("Rosa", 1.0)] * 3}
    replies = Replies(questions, said, ANSWER.empty_table(), {"adapter": grades}, {}, {}, {}, {})
    assert grades == [True, None, False]
    assert score_replies(replies)["adapter"]["judge"] == [1.0, 0.0, 0.0]
