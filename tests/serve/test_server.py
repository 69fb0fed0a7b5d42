"""What a replica does around its engine, without one."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

import pytest

from pipeline.config import Serve
from serve.registry import Refused
from serve.server import AdapterServer


def test_a_request_that_is_too_slow_ends_in_the_engine_too() -> None:
    """Its client has its answer from the ingress by then; what goes on here would take room from the others."""
    ended = []

    async def engine() -> AsyncGenerator[str, None]:
        try:
            await asyncio.Event().wait()
            yield "never"
        finally:
            ended.append(True)

    async def ask() -> Counter[str]:
        server = AdapterServer.__new__(AdapterServer)
        server._settings = Serve(request_timeout_s=0.01)
        server._in_use = Counter()
        server._idle = asyncio.Condition()
        with pytest.raises(Refused, match="in time"):
            await anext(server._using("ada@1", engine()))
        return server._in_use

    assert asyncio.run(ask())["ada@1"] == 0
    assert ended
