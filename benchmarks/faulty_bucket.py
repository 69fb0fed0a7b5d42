"""A bucket on an S3 server of this machine that answers one request in twenty with 503, or not at all.

In: nothing. Out: URIs in an empty bucket, with the faults and past them, and the count of requests. The server is
moto's; the faults come from a proxy before it, which holds what is stalled until any client has given up, half of it
after the server has done it.
"""

import asyncio
import contextlib
import logging
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping

import aiohttp
import pyarrow.fs as pafs
from aiohttp import web

FAULT_SHARE = 0.05
STALL_S = 20.0
SLOW_DOWN = (
    '<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)


class FaultyBucket:
    """Forwards requests to a server, or fails them; seeded, so that a run fails as often as the next."""

    def __init__(self, server: str, share: float = FAULT_SHARE, seed: int = 0) -> None:
        self._server = server
        self._share = share
        self._random = random.Random(seed)
        self._counts: Counter[str] = Counter()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._loop = asyncio.new_event_loop()

    def uri(self, folder: str) -> str:
        """Return a folder's URI, as a config takes it."""
        return _uri(f"127.0.0.1:{self._socket.getsockname()[1]}", folder)

    def direct_uri(self, folder: str) -> str:
        """Return a folder's URI past the faults."""
        return _uri(self._server, folder)

    def requests(self) -> dict[str, float]:
        """Return how many requests came, and what was done to them."""
        total = self._counts.total()
        return dict(self._counts) | {"faulty_share": round(1 - self._counts["served"] / max(1, total), 4)}

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = self._random.choice(("failed", "stalled", "lost")) if self._random.random() < self._share else "served"
        self._counts[fault] += 1
        if fault == "failed":
            return web.Response(status=503, text=SLOW_DOWN, content_type="application/xml")
        if fault != "stalled":
            response = await self._forward(request, body)
        if fault == "served":
            return response
        # Whoever asked has given up by then.
        await asyncio.sleep(STALL_S)
        return web.Response(status=500)

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        headers = _without_chunks(request.headers)
        url = f"http://{self._server}{request.raw_path}"
        async with self._session.request(request.method, url, headers=headers, data=body) as reply:
            return web.Response(status=reply.status, headers=_without_chunks(reply.headers), body=await reply.read())

    async def _serve(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0)
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    def start(self) -> None:
        def forever() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._serve())
            self._loop.run_forever()

        threading.Thread(target=forever, daemon=True).start()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)


def _uri(host: str, folder: str) -> str:
    return f"s3://key:secret@bucket/{folder}?endpoint_override={host}&scheme=http"


def _without_chunks(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a message whose body was read as a whole."""
    return {key: value for key, value in headers.items() if key.lower() not in ("transfer-encoding", "expect")}


@contextlib.contextmanager
def faulty_bucket(share: float = FAULT_SHARE) -> Iterator[FaultyBucket]:
    """Run the server, its proxy and an empty bucket until the block ends."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    bucket = FaultyBucket(f"{host}:{port}", share)
    filesystem, _ = pafs.FileSystem.from_uri(f"{bucket.direct_uri('')}&allow_bucket_creation=true")
    filesystem.create_dir("bucket")
    bucket.start()
    try:
        yield bucket
    finally:
        bucket.stop()
        server.stop()
