"""What becomes of a judge that does not grade, and of a grade that cannot be read."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from pipeline import held_out
from pipeline.arms import Replies, Reply, _grade_remotely
from pipeline.config import Judge
from pipeline.evaluate import score_replies
from pipeline.prompts import judge_chat, parse_grade
from pipeline.schema import ANSWER


class Refusal(BaseHTTPRequestHandler):
    """Answers every request with 401."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_judge_that_refuses_our_key_is_named() -> None:
    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        judge = Judge(model="grader", url=f"http://127.0.0.1:{server.server_port}/v1")
        with pytest.raises(ValueError, match=r"evaluate\.judge: 'grader' does not grade .*401"):
            _grade_remotely(judge, [judge_chat("Who built it?", ["Rosa"], "Rosa did.")], "a key")
        server.shutdown()


def test_a_grade_that_cannot_be_read_counts_as_wrong() -> None:
    grades = [parse_grade(text) for text in ("Reason: yes.\nGrade: correct", "It is fine.", "Grade: wrong")]
    questions = [held_out.TestQuestion(str(number), "Who built it?", ["Rosa"], "Rosa built it.") for number in range(3)]
    said = {"adapter": [Reply("Rosa", 1.0)] * 3}
    replies = Replies(questions, said, ANSWER.empty_table(), {"adapter": grades}, {}, {}, {}, {})
    assert grades == [True, None, False]
    assert score_replies(replies)["adapter"]["judge"] == [1.0, 0.0, 0.0]
