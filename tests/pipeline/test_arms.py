"""What becomes of a judge that does not grade."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from pipeline.arms import _grade_remotely
from pipeline.config import Judge
from pipeline.prompts import judge_chat


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
