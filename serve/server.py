"""Request -> base model + the adapter it names -> tokens: one replica, which owns one vLLM engine.

In: OpenAI requests whose `model` is an exact version, routed by Serve's multiplexing. Out: OpenAI responses.
On first use an adapter is copied from the registry and checked, loaded, and asked a question whose answer is known:

    registered -> loading -> probing -> ready | failed(reason)

vLLM keeps the least recently used ones out of its slots (GPU) and its cache (CPU memory); Serve's multiplexing keeps
the number on the replica's disk bounded. Nothing is dropped while a request uses it: the engine reads files lazily, and
would die of a missing one.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from ray import serve
from ray.llm._internal.serve.core.configs.accelerators import CPUConfig
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest, ErrorResponse
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.util.metrics import Counter as MetricCounter
from ray.util.metrics import Histogram
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

from pipeline.base_model import BaseModel
from pipeline.config import Serve
from serve.registry import Refused, Registry, Version

FAILED_S = 30.0  # a failed adapter is tried again after this long
TIE_NATS = 0.5  # logits near 20 are 0.125 apart in bf16; kernels that add in another order swap neighbours
PINNED_S = 5.0
log = logging.getLogger("ray.serve")


@dataclass
class AdapterState:
    """Where an adapter stands on this replica."""

    state: Literal["registered", "loading", "probing", "ready", "failed"]
    since: float  # seconds since the epoch
    reason: str = ""
    pinned: bool = False
    load_s: float = 0.0


class AdapterServer(LLMServer):
    """LLMServer that takes its adapters from our registry."""

    async def __init__(self, llm_config: LLMConfig, *, registry: str, base: BaseModel, settings: Serve) -> None:
        self._registry = Registry(registry)
        self._base = base
        self._settings = settings
        self._cache = _own_folder(Path(settings.cache_dir))
        self._states: dict[str, AdapterState] = {}
        self._in_use: Counter[str] = Counter()
        self._idle = asyncio.Condition()
        self._loads = MetricCounter("distillery_adapter_loads", "Adapters loaded on a replica.", ("outcome",))
        self._load_seconds = Histogram(
            "distillery_adapter_load_s", "From the first request to ready.", [0.1, 0.3, 1, 3, 10, 30]
        )
        on_gpu = not isinstance(llm_config.accelerator_config, CPUConfig)
        await super().__init__(
            llm_config,
            engine_cls=None if on_gpu else CpuEngine,
            model_downloader=partial(_Loader, self),  # type: ignore[arg-type]
        )
        for name in settings.preload:
            with contextlib.suppress(Refused):  # its state says why
                await self._multiplexed(self._registry.resolve(name).model_id)
        self._pinning = asyncio.create_task(self._keep_pinned())

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._using(request.model, await super().chat(request, raw_request_info))

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._using(request.model, await super().completions(request, raw_request_info))

    async def adapter_states(self) -> dict[str, Any]:
        """Return this replica's id and the state of every adapter that it has met."""
        replica = serve.get_replica_context().replica_tag
        return {"replica": replica, "adapters": {name: asdict(state) for name, state in self._states.items()}}

    def _using(self, model: str, stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        # Here and not below: a generator's body starts later, and an eviction could come first.
        self._in_use[model] += 1

        async def counted() -> AsyncGenerator[Any, None]:
            try:
                async with contextlib.aclosing(stream):
                    # The ingress tells the client as much; but Ray cancels nothing here, and vLLM would go on.
                    async with asyncio.timeout(self._settings.request_timeout_s):
                        first = await anext(stream)
                    yield first
                    async for item in stream:
                        yield item
            except TimeoutError:
                raise Refused(503, "timeout", "No answer in time; ask again.") from None
            finally:
                self._in_use[model] -= 1
                async with self._idle:
                    self._idle.notify_all()

        return counted()

    async def load_adapter(self, model_id: str) -> SimpleNamespace:
        """Bring an adapter to `ready`, or raise Refused; Serve's multiplexing calls this once at a time."""
        state = self._states.get(model_id)
        if state and state.state == "failed" and time.time() - state.since < FAILED_S:
            raise Refused(409, "adapter_refused", state.reason)
        if state and state.state == "ready":  # dropped by Serve, kept by us
            return self._loaded(model_id)
        started = time.monotonic()
        name, _, version = model_id.partition("@")
        folder = self._cache / model_id
        try:
            self._enter(model_id, "loading")
            max_bytes = self._settings.max_adapter_mb << 20
            manifest = await asyncio.to_thread(
                self._registry.fetch_adapter,
                Version(name, version),
                folder,
                self._base,
                self._settings.max_rank,
                max_bytes,
            )
            loaded = self._loaded(model_id)
            await self._engine.resolve_lora(loaded)
            self._enter(model_id, "probing")
            if manifest["probe"] is not None:
                await self._probe(model_id, manifest["probe"])
        except Exception as error:
            refused = error if isinstance(error, Refused) else await self._blame(model_id, error)
            if refused.status == 503:
                self._enter(model_id, "registered")
                raise refused from error
            await self._forget(model_id)
            self._enter(model_id, "failed", refused.message)
            self._loads.inc(tags={"outcome": "failed"})
            raise refused from (None if refused is error else error)
        self._enter(model_id, "ready")
        self._states[model_id].load_s = round(time.monotonic() - started, 3)
        self._load_seconds.observe(time.monotonic() - started)
        self._loads.inc(tags={"outcome": "ready"})
        return loaded

    async def _blame(self, model_id: str, error: Exception) -> Refused:
        """Say whether an adapter could not be loaded because of itself, or because storage or the engine is gone."""
        if isinstance(error, OSError):
            return Refused(503, "service_unavailable", "The adapter cannot be read just now; ask again.")
        try:
            await self._engine.check_health()
        except Exception:
            return Refused(503, "service_unavailable", "The engine failed; ask again.")
        return Refused(409, "adapter_refused", f"The adapter {model_id!r} could not be loaded.")

    def _loaded(self, model_id: str) -> SimpleNamespace:
        # Serve awaits `__del__` of what it drops; on the instance, Python's own collector never calls it.
        return SimpleNamespace(
            model_id=model_id, local_path=str(self._cache / model_id), __del__=partial(self._drop, model_id)
        )

    async def _drop(self, model_id: str) -> None:
        """Unload an adapter as soon as no request uses it; a pinned one stays, and one that does not get idle."""
        if self._states[model_id].pinned:
            return
        try:
            async with asyncio.timeout(self._settings.request_timeout_s), self._idle:
                await self._idle.wait_for(lambda: not self._in_use[model_id])
        except TimeoutError:
            return
        await self._forget(model_id)
        self._enter(model_id, "registered")

    async def _forget(self, model_id: str) -> None:
        models = self._engine._oai_models
        if model_id in models.lora_requests:
            lora_id = self._lora_id(model_id)
            await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=model_id))
            await self._engine._engine_client.remove_lora(lora_id)
        await asyncio.to_thread(shutil.rmtree, self._cache / model_id, ignore_errors=True)

    async def _probe(self, model_id: str, probe: dict[str, Any]) -> None:
        """Ask the probe question; Refused unless the engine answers as PEFT did, up to a tie."""
        request = CompletionRequest(
            model=model_id,
            prompt=probe["prompt_ids"],
            max_tokens=len(probe["answer_ids"]),
            temperature=0.0,
            logprobs=5,
            return_tokens_as_token_ids=True,
        )
        response = await anext(self._engine.completions(request))
        if isinstance(response, ErrorResponse):
            raise ValueError(response.error.message)
        logprobs = response.choices[0].logprobs
        lead = lead_over(probe["answer_ids"], logprobs.tokens, logprobs.top_logprobs)
        if lead is not None and lead > TIE_NATS:
            raise Refused(
                409,
                "adapter_refused",
                f"The adapter {model_id!r} failed its probe: the answer differs from the one recorded when it was "
                f"published, by {lead:.2f} nats.",
            )

    async def _keep_pinned(self) -> None:
        """Hold the live versions of pinned names in the engine's slots, all but one slot at most."""
        while True:
            try:
                pinned = await asyncio.to_thread(self._registry.pinned, self._base.revision)
            except OSError as error:
                log.warning("pinned adapters cannot be looked up: %s", error)
            else:
                wanted = [version.model_id for version in pinned[: self._settings.adapter_slots - 1]]
                left = [m for m, state in self._states.items() if state.pinned and m not in wanted]
                for pin, model_id in [*((self._unpin, m) for m in left), *((self._pin, m) for m in wanted)]:
                    try:
                        await pin(model_id)
                    except Exception as error:  # one adapter's trouble is not the others'
                        log.warning("%s: cannot be pinned or let go: %s", model_id, error)
            await asyncio.sleep(PINNED_S)

    async def _pin(self, model_id: str) -> None:
        await self._multiplexed(model_id)
        if not self._states[model_id].pinned:
            request = self._engine._oai_models.lora_requests[model_id]
            await self._engine._engine_client.add_lora(request)  # it may have left vLLM's memory
            await self._engine._engine_client.pin_lora(request.lora_int_id)
            self._states[model_id].pinned = True

    async def _unpin(self, model_id: str) -> None:
        await self._engine._engine_client.remove_lora(self._lora_id(model_id))  # vLLM knows no unpin
        self._states[model_id].pinned = False

    async def _multiplexed(self, model_id: str) -> None:
        """Load an adapter as a request for it would."""
        load: Any = self._load_model
        await load(model_id)

    def _lora_id(self, model_id: str) -> int:
        return self._engine._oai_models.lora_requests[model_id].lora_int_id

    @property
    def _engine(self) -> Any:
        """The vLLM engine wrapper; its members are Ray's own, tested with the pinned version."""
        return self.engine

    def _enter(self, model_id: str, state: Any, reason: str = "") -> None:
        self._states[model_id] = AdapterState(state, time.time(), reason)


def lead_over(wanted: list[int], tokens: list[str], top_logprobs: list[dict[str, float]]) -> float | None:
    """Return by how many nats the first token that differs from the wanted one beat it; None if none differs.

    `tokens` are those of a completion with `return_tokens_as_token_ids`; beyond the reported top the lead is infinite.
    """
    for token_id, given, top in zip(wanted, tokens, top_logprobs, strict=False):
        if given != f"token_id:{token_id}":
            return top[given] - top.get(f"token_id:{token_id}", float("-inf"))
    return None


class CpuEngine(VLLMEngine):
    """Ray LLM gives a CPU's one worker a process of its own: ten seconds more to start, and a copy at every token."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        prepared = super()._prepare_engine_config(callback_ctx)
        prepared[-1].parallel_config.distributed_executor_backend = "uni"
        return prepared


class _Loader:
    """The seam that LLMServer offers for loading adapters."""

    def __init__(self, server: AdapterServer, **_: Any) -> None:
        self._server = server

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> SimpleNamespace:
        return await self._server.load_adapter(lora_model_id)


def _own_folder(cache: Path) -> Path:
    """Make this process's folder, and remove those of processes that are gone."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in cache.iterdir():
        if old.name.isdigit() and not Path("/proc", old.name).exists():
            shutil.rmtree(old, ignore_errors=True)
    own = cache / str(os.getpid())
    own.mkdir(exist_ok=True)
    return own
