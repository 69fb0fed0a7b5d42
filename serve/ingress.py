"""HTTP -> who asks, which version, which passages -> a replica; and its answer or a clear error back.

In: OpenAI requests from any client. Out: OpenAI responses; what we add to one stands under its key `distillery`.
The aliases, keys and names of the registry are remembered for `serve.alias_seconds`, so a moved alias takes effect that
soon, on every ingress replica, without a restart. Errors have OpenAI's shape and hold no internals; keys and prompts
are never logged.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
import ray
from cachetools import LRUCache, TTLCache, cached
from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from jinja2 import TemplateError
from ray.exceptions import RayActorError, RayTaskError
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    ErrorResponse,
    ModelCard,
)
from ray.llm._internal.serve.utils.broadcast import broadcast
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

from pipeline.config import AUTO, Config, Serve
from pipeline.engine import load_tokenizer, render_chat
from pipeline.prompts import retrieval_question, student_chat
from serve.access import ANYONE, EVERY, Caller, identify, read_keys
from serve.http import ChatRequest, TextRequest, error_body, make_http_app
from serve.registry import Refused, Registry, Version
from serve.retrieval import Corpora

SEARCHES = 4  # at a time
MANIFEST_SECONDS = 60  # a version that was evaluated anew shows its new scores after so long
ATTEMPTS = 3  # a replica that dies before its first token costs the client nothing
log = logging.getLogger("ray.serve")


class Ingress(OpenAiIngress):
    """The HTTP side of the endpoint; it holds no model and can have any number of replicas."""

    def __init__(self, server: DeploymentHandle, base: dict[str, Any], config: Config) -> None:
        """`base` is the base model's card: its `id` is the name that clients use."""
        self._base: str = base["id"]
        card = ModelCard(id=self._base, object="model", owned_by="base", permission=[], metadata={})
        super().__init__({self._base: server}, {self._base: card})
        self._base_card = base
        self._registry = Registry(config.publish.registry)
        self._settings = settings = config.serve
        self._tokenizer = load_tokenizer(config.model.path)
        self._max_model_len = config.model.max_model_len
        self._reply_tokens = config.answer.max_tokens
        self._corpora = Corpora(self._registry, settings.max_adapter_mb << 20)
        self._searching = ThreadPoolExecutor(SEARCHES, "search")
        self._routing = ThreadPoolExecutor(1, "route")  # an index over all corpora takes its time
        self._keys: list[dict[str, Any]] | None = None
        self._remembered: TTLCache[Any, Any] = TTLCache(10_000, settings.alias_seconds)
        self._last: LRUCache[Any, Any] = LRUCache(10_000)
        self._manifest = cached(TTLCache(10_000, MANIFEST_SECONDS), lock=Lock())(self._registry.manifest)
        self._active: Counter[str] = Counter()

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        caller = await self._caller(request)
        extra: dict[str, Any] = {}
        question = _last_question(body)
        _refuse_prompt_logprobs(body)
        version = await self._version(body.model, caller, question, extra)
        retrieval = (body.model_extra or {}).get("retrieval")
        if retrieval and not (body.model == AUTO and version is None):
            version = await self._add_passages(body, version, question, retrieval, extra)
        body.model = version.model_id if version else self._base
        return await self._respond(body, "chat", caller, extra)

    async def completions(self, body: TextRequest, request: Request) -> Response:
        caller = await self._caller(request)
        extra: dict[str, Any] = {}
        if (body.model_extra or {}).get("retrieval"):
            raise Refused(400, "unsupported", "'retrieval' needs /v1/chat/completions.")
        _refuse_prompt_logprobs(body)
        version = await self._version(body.model, caller, body.prompt if isinstance(body.prompt, str) else None, extra)
        body.model = version.model_id if version else self._base
        return await self._respond(body, "completions", caller, extra)

    async def models(self, request: Request) -> Response:
        """The base model and every live adapter that the caller may use."""
        caller = await self._caller(request)
        live = [version for version in await self._live() if caller.may_use(version.name)]
        cards = await asyncio.gather(*(asyncio.to_thread(self._card, version) for version in live))
        return JSONResponse({"object": "list", "data": [self._base_card, *(card for card in cards if card)]})

    async def model_data(self, model: str, request: Request) -> Response:
        caller = await self._caller(request)
        version = await self._version(model, caller, None, {})
        card = await asyncio.to_thread(self._card, version) if version else self._base_card
        if card is None:
            raise Refused(404, "model_not_found", f"The model {model[:200]!r} does not exist.")
        return JSONResponse(card | {"id": model})

    async def adapters(self, request: Request) -> Response:
        """The state of every adapter on every replica: what is loaded where, and why something is not."""
        caller = await self._caller(request)
        server = self._default_serve_handles[self._base]
        try:
            replicas = await asyncio.to_thread(broadcast, server, "adapter_states")
        except TimeoutError:  # with serve.min_replicas = 0 there may be none
            replicas = []
        for replica in replicas:
            states = replica["adapters"].items()
            replica["adapters"] = {name: s for name, s in states if caller.may_use(name.partition("@")[0])}
        return JSONResponse({"replicas": replicas})

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def page(self) -> Response:
        return HTMLResponse(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))

    async def metrics(self, request: Request) -> Response:
        """Prometheus text of every node of the cluster; it names every adapter, so a key must be for all of them."""
        if not (await self._caller(request)).may_use(EVERY):
            raise Refused(403, "forbidden", "Metrics need a key for all adapters.")
        nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
        urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
        async with httpx.AsyncClient(timeout=10) as client:
            found = await asyncio.gather(*(client.get(url) for url in urls), return_exceptions=True)
        return PlainTextResponse("".join(reply.text for reply in found if isinstance(reply, httpx.Response)))

    async def _caller(self, request: Request) -> Caller:
        keys = await self._remember("keys", read_keys, self._registry.folder)
        if keys is not None:  # a file that is gone since, with its registry, lets nobody in who had no key
            self._keys = keys
        return identify(self._keys, request.headers.get("authorization"))

    async def _version(
        self, model: str | None, caller: Caller, question: str | None, extra: dict[str, Any]
    ) -> Version | None:
        """Return the version that a request means, None for the base model; unknown and forbidden look alike."""
        if not model or model == self._base:
            return None
        if model == AUTO:
            return await self._route(caller, question, extra)
        if not caller.may_use(model.partition("@")[0]):
            raise Refused(404, "model_not_found", f"The model {model[:200]!r} does not exist.")
        return await self._remember(("model", model), self._registry.resolve, model)

    async def _route(self, caller: Caller, question: str | None, extra: dict[str, Any]) -> Version | None:
        if not question:
            raise Refused(400, "unsupported", "'auto' needs a question in plain text.")
        live = await self._live()
        allowed = frozenset(version.name for version in live if caller.may_use(version.name))
        found = await self._in(self._routing, self._corpora.route, question, frozenset(live), allowed)
        chosen = found[0] if found and found[1] >= self._settings.auto_min_score else None
        extra["route"] = {"model": chosen.model_id if chosen else self._base}
        if caller.may_use(EVERY):  # a word's weight in it tells how many passages of all corpora have the word
            extra["route"] |= {
                "score": round(found[1], 3) if found else 0.0,
                "min_score": self._settings.auto_min_score,
            }
        return chosen

    async def _add_passages(
        self, body: ChatCompletionRequest, version: Version | None, question: str | None, k: Any, extra: dict[str, Any]
    ) -> Version | None:
        """Put the best passages of the adapter's own corpus before the question, and return who is to read them.

        They stand as the teacher saw them, as many as fit: room stays for the reply that the client allows, else for as
        long an answer as was trained on.
        """
        k = self._settings.retrieval_passages if k is True else k
        if not isinstance(k, int) or not 1 <= k <= 20:
            raise Refused(400, "invalid_value", f"retrieval = {k!r} must be true or a number of passages from 1 to 20.")
        if version is None or not question:
            raise Refused(400, "unsupported", "'retrieval' needs an adapter and a question in plain text.")
        hits = await self._in(self._searching, self._corpora.search, version, question, k)
        messages: Any = body.messages
        passages = [hit.passage for hit in hits]
        fits = partial(self._fits, messages[:-1], body.max_completion_tokens or body.max_tokens or self._reply_tokens)
        messages[-1]["content"], count = await self._in(self._searching, retrieval_question, passages, question, fits)
        extra["sources"] = [
            {**{key: hit.passage[key] for key in ("source", "heading", "text")}, "score": round(hit.score, 3)}
            for hit in hits[:count]
        ]
        return await self._reader(version) if count else version

    async def _reader(self, version: Version) -> Version | None:
        """Return who reads the passages of a version's corpus: the version, or None for the base model."""
        if self._settings.retrieval_model != "better":
            return version if self._settings.retrieval_model == "adapter" else None
        manifest = await asyncio.to_thread(self._manifest, version)
        scores, metric = manifest["scores"], manifest["metric"]
        if not {"adapter_retrieval", "retrieval"} <= scores.keys():
            return version
        return version if scores["adapter_retrieval"][metric] >= scores["retrieval"][metric] else None

    def _fits(self, earlier: list[dict[str, Any]], reply_tokens: int, asked: str) -> bool:
        """Say whether the question has room behind the texts of earlier messages, and a reply behind it."""
        said = [{"role": message["role"], "content": _text_of(message)} for message in earlier]
        try:
            prompt = render_chat(self._tokenizer, [*said, *student_chat(asked)])
        except TemplateError:  # of the messages, which the engine judges
            return True
        return len(prompt) + reply_tokens <= self._max_model_len

    async def _in(self, threads: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call it in threads of its own: while an index is built, others' aliases and keys are still looked up."""
        async with asyncio.timeout(self._settings.request_timeout_s):
            return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)

    async def _live(self) -> list[Version]:
        """Return what can be served: a registry may hold adapters of other base models as well."""
        return await self._remember("live", self._registry.live, self._base_card["metadata"]["base_revision"])

    def _card(self, version: Version) -> dict[str, Any] | None:
        try:
            manifest = self._manifest(version)
        except Refused:
            return None
        metadata = {
            key: manifest[key]
            for key in ("version", "base_model", "base_revision", "rank", "scores", "metric", "created")
        }
        return {
            "id": version.name,
            "object": "model",
            "created": int(datetime.fromisoformat(manifest["created"]).timestamp()),
            "owned_by": "corpus",
            "parent": self._base,
            "metadata": metadata | {"corpus": version.name, "probe": (manifest["probe"] or {}).get("question")},
        }

    async def _remember(self, key: Any, read: Callable[..., Any], *arguments: Any) -> Any:
        """Return what was read within `serve.alias_seconds`, else read it; while storage fails, what was last read."""
        found = self._remembered.get(key, self)
        if found is not self:
            return found
        try:
            found = await asyncio.to_thread(read, *arguments)
        except OSError as error:
            if key not in self._last:
                raise
            log.warning("the registry cannot be read, what it said last holds: %s", error)
            found = self._last[key]
        self._remembered[key] = self._last[key] = found
        return found

    async def _respond(
        self, body: ChatCompletionRequest | CompletionRequest, call: str, caller: Caller, extra: dict[str, Any]
    ) -> Response:
        stream = self._answer(body, call, caller)
        async with asyncio.timeout(self._settings.request_timeout_s):
            first = await anext(stream)
        if not body.stream:
            await stream.aclose()
            return JSONResponse(first.model_dump() | ({"distillery": extra} if extra else {}))
        return StreamingResponse(_events(first, stream, body.model or "", extra), media_type="text/event-stream")

    async def _answer(self, body: Any, call: str, caller: Caller) -> AsyncGenerator[Any, None]:
        """Yield what the replica yields; a caller's share of the endpoint is counted while it does."""
        most, count = self._settings.max_requests_per_key, _count_answers(body)
        if count > most:
            raise Refused(400, "too_many_answers", f"The request asks for {count} answers; {most} are given at a time.")
        if caller != ANYONE and self._active[caller.id] + count > most:
            raise Refused(429, "rate_limit_exceeded", f"This key may have {most} answers in work; wait for one.")
        self._active[caller.id] += count
        try:
            for attempt in range(1, ATTEMPTS + 1):
                started = False
                try:
                    async for item in self._get_response(body=body, call_method=call):
                        head = item[0] if isinstance(item, list) and item else item  # a stream comes in batches
                        if isinstance(head, ErrorResponse):
                            raise _refusal(head)
                        started = True
                        yield item
                    return
                except RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Refused) else error from None
                except BackPressureError:
                    raise Refused(503, "service_unavailable", "The queue is full; ask again.") from None
                except RayActorError:
                    if started or attempt == ATTEMPTS:
                        raise
        finally:
            self._active[caller.id] -= count

    def _get_configured_serve_handle(self, model_id: str) -> DeploymentHandle:
        """Route an adapter's requests to the replicas that have it; the base model's go anywhere."""
        server = self._default_serve_handles[self._base]
        if model_id == self._base:
            return server.options(stream=True)
        return server.options(stream=True, multiplexed_model_id=model_id)

    async def _get_model_id(self, model: str | None) -> str:
        return model or self._base


def make_ingress(settings: Serve) -> Any:
    """Return the ingress class with its routes, for `serve.deployment`."""
    app = make_http_app(settings)
    routes = {
        "chat": app.post("/v1/chat/completions"),
        "completions": app.post("/v1/completions"),
        "models": app.get("/v1/models"),
        "model_data": app.get("/v1/models/{model:path}"),
        "adapters": app.get("/v1/adapters"),
        "health": app.get("/health"),
        "metrics": app.get("/metrics"),
        "page": app.get("/"),
    }
    endpoint_map: Any = {name: lambda _, route=route: route for name, route in routes.items()}
    return make_fastapi_ingress(Ingress, endpoint_map=endpoint_map, app=app)


async def _events(
    first: Any, rest: AsyncGenerator[Any, None], model: str, extra: dict[str, Any]
) -> AsyncGenerator[str, None]:
    """Join a stream's batches of server-sent events; what went wrong in the middle becomes an event too."""

    def text(batch: Any) -> str:
        return "".join(batch) if isinstance(batch, list) else batch

    try:
        yield _with_extra(text(first), extra)
        async for batch in rest:
            yield text(batch)
    except Exception as error:
        log.warning("a stream of %s ended early: %s", model, type(error).__name__)
        message = error.message if isinstance(error, Refused) else "The replica stopped; ask again."
        yield f"data: {json.dumps(error_body(503, 'service_unavailable', message))}\n\ndata: [DONE]\n\n"
    finally:
        await rest.aclose()


def _with_extra(events: str, extra: dict[str, Any]) -> str:
    """Put what we add to a stream into its first event: one of its own would have no choices, which clients expect."""
    if not extra:
        return events
    event, end, others = events.removeprefix("data: ").partition("\n\n")
    return f"data: {json.dumps(json.loads(event) | {'distillery': extra})}{end}{others}"


def _refusal(error: ErrorResponse) -> Refused:
    """What vLLM says of a bad request goes to the client as it is; its own failures do not."""
    if error.error.code < 500:
        return Refused(error.error.code, error.error.type, error.error.message)
    return Refused(503, "service_unavailable", "The engine failed; ask again.")


def _refuse_prompt_logprobs(body: Any) -> None:
    """Refuse what ends vLLM's CPU engine when other adapters' requests are in the same batch.

    With `echo`, vLLM takes the number of the answer's log-probabilities for the prompt, and zero is one; a chat has
    zero unasked.
    """
    is_echoed = body.echo and (isinstance(body, ChatCompletionRequest) or body.logprobs is not None)
    if body.prompt_logprobs is not None or is_echoed:
        raise Refused(400, "unsupported", "Log-probabilities of the prompt are not served.")


def _count_answers(body: Any) -> int:
    """Return how many answers a request makes the engine work on: `n` for each of its prompts."""
    prompt = getattr(body, "prompt", None)
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return prompts * max(1, body.n or 1)  # the engine refuses a negative one


def _text_of(message: dict[str, Any]) -> str:
    """Return a message's text, which may come in parts; other parts, and calls of tools, have none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _last_question(body: ChatCompletionRequest) -> str | None:
    """Return the text of the last message, None if it holds something else as well."""
    message: Any = body.messages[-1] if body.messages else {}
    content = message.get("content")
    if isinstance(content, list) and any(part.get("type") != "text" for part in content):
        return None
    return _text_of(message)
