"""What the ingress does with a replica's answers, without one."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from cachetools import TTLCache
from fastapi.testclient import TestClient
from ray.exceptions import RayActorError

from pipeline.config import Serve
from serve.access import ANYONE, Caller
from serve.http import make_http_app
from serve.ingress import ATTEMPTS, Ingress

BODY: Any = SimpleNamespace(model="ada@1", stream=True, n=1)


def ingress_of(replica: Callable[..., AsyncGenerator[Any, None]]) -> Any:
    ingress: Any = Ingress.__new__(Ingress)
    ingress._settings, ingress._active, ingress._get_response = Serve(), Counter(), replica
    return ingress


async def read(ingress: Any) -> list[Any]:
    return [item async for item in ingress._answer(BODY, "chat", ANYONE)]


def test_a_stream_that_is_left_counts_no_more() -> None:
    async def replica(body: Any, call_method: str) -> AsyncGenerator[str, None]:
        while True:
            yield "data: {}\n\n"

    async def leave() -> tuple[int, int]:
        ingress = ingress_of(replica)
        reply = await ingress._respond(BODY, "chat", Caller("key", frozenset("*")), {})
        await anext(reply.body_iterator)
        during = ingress._active["key"]
        await reply.body_iterator.aclose()
        return during, ingress._active["key"]

    assert asyncio.run(leave()) == (1, 0)


@pytest.mark.parametrize(("deaths", "answers"), [(ATTEMPTS - 1, ["a"]), (ATTEMPTS, None)])
def test_another_replica_is_asked_if_one_dies_before_its_first_token(deaths: int, answers: list[str] | None) -> None:
    tries = []

    async def replica(body: Any, call_method: str) -> AsyncGenerator[str, None]:
        tries.append(body)
        if len(tries) <= deaths:
            raise RayActorError
        yield "a"

    if answers is None:
        with pytest.raises(RayActorError):
            asyncio.run(read(ingress_of(replica)))
    else:
        assert asyncio.run(read(ingress_of(replica))) == answers
    assert len(tries) == ATTEMPTS


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    tries = []

    async def replica(body: Any, call_method: str) -> AsyncGenerator[str, None]:
        tries.append(body)
        yield "a"
        raise RayActorError

    with pytest.raises(RayActorError):
        asyncio.run(read(ingress_of(replica)))
    assert len(tries) == 1


def test_while_storage_fails_what_was_last_read_holds() -> None:
    replies: list[Any] = ["first", OSError("gone"), OSError("gone")]

    def look() -> str:
        reply = replies.pop(0)
        if isinstance(reply, OSError):
            raise reply
        return reply

    async def ask() -> str:
        ingress: Any = Ingress.__new__(Ingress)
        ingress._last = {}
        ingress._remembered = TTLCache(9, ttl=0)  # nothing is remembered
        assert await ingress._remember("live", look) == "first"
        last = await ingress._remember("live", look)
        with pytest.raises(OSError, match="gone"):
            await ingress._remember("another", look)
        return last

    assert asyncio.run(ask()) == "first"


def test_an_error_of_ours_tells_nothing_of_itself() -> None:
    app = make_http_app(Serve())

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("a secret")

    reply = TestClient(app, raise_server_exceptions=False).get("/broken")
    assert reply.status_code == 500
    assert "secret" not in reply.text and reply.json()["error"]
