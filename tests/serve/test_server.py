"""What a replica does around its engine, without one."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import Serve
from serve.registry import Refused, Version
from serve.server import AdapterServer, AdapterState


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


def test_pinned_adapters_hold_all_slots_but_one_until_they_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three are pinned, and there are three slots; then one of the two that had them is pinned no more."""
    monkeypatch.setattr("serve.server.PINNED_S", 0)
    ada, bob, cleo = (Version(name, "1") for name in ("ada", "bob", "cleo"))
    looks, calls = [[ada, bob, cleo], [ada, bob, cleo], [bob]], []

    def noting(name: str) -> Callable[[Any], Coroutine[Any, Any, None]]:
        async def note(what: Any) -> None:
            calls.append((name, getattr(what, "lora_int_id", what)))

        return note

    async def hold() -> dict[str, AdapterState]:
        server: Any = AdapterServer.__new__(AdapterServer)
        server._settings, server._base = Serve(adapter_slots=3), SimpleNamespace(revision="r")
        server._registry = SimpleNamespace(pinned=lambda _: looks.pop(0))
        server._states, server._in_use, server._idle = {}, Counter(), asyncio.Condition()
        requests = {each.model_id: SimpleNamespace(lora_int_id=n) for n, each in enumerate((ada, bob, cleo), 1)}
        server.engine = SimpleNamespace(
            _oai_models=SimpleNamespace(lora_requests=requests),
            _engine_client=SimpleNamespace(
                add_lora=noting("add"), pin_lora=noting("pin"), remove_lora=noting("remove")
            ),
        )

        async def load(model_id: str) -> None:
            server._states.setdefault(model_id, AdapterState("ready", 0.0))

        server._load_model, server._forget = load, noting("forget")
        with pytest.raises(IndexError):  # there is nothing more to look at
            await server._keep_pinned()
        for version in (ada, bob):
            await server._drop(version.model_id)
        return server._states

    states = asyncio.run(hold())
    assert calls == [("add", 1), ("pin", 1), ("add", 2), ("pin", 2), ("remove", 1), ("forget", "ada@1")]
    assert states["bob@1"].pinned and "cleo@1" not in states


@pytest.mark.parametrize(
    ("error", "status", "state", "fetches"),
    [(OSError("gone"), 503, "registered", 2), (Refused(409, "adapter_refused", "Too large."), 409, "failed", 1)],
)
def test_storage_that_is_gone_is_asked_again_and_a_bad_adapter_is_not(
    error: Exception, status: int, state: str, fetches: int, tmp_path: Path
) -> None:
    tries = []

    def fetch_adapter(*arguments: object) -> None:
        tries.append(arguments)
        raise error

    async def nothing(_: str) -> None:
        pass

    async def ask() -> AdapterState:
        server: Any = AdapterServer.__new__(AdapterServer)
        server._settings, server._base, server._states, server._cache = Serve(), None, {}, tmp_path
        server._registry, server._forget = SimpleNamespace(fetch_adapter=fetch_adapter), nothing
        server._loads = SimpleNamespace(inc=lambda tags: None)
        for _ in range(2):
            with pytest.raises(Refused) as refused:
                await server.load_adapter("ada@1")
            assert refused.value.status == status
        return server._states["ada@1"]

    assert asyncio.run(ask()).state == state
    assert len(tries) == fetches
