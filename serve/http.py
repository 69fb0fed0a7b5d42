"""The HTTP app around the ingress: how large a request may be, and what an error looks like.

In: any request. Out: for a refused or failed one, OpenAI's error shape without internals, and Retry-After where asking
again helps.
"""

import logging
from typing import Any, Self

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ModelWrapValidatorHandler, ValidationError, model_validator
from ray.exceptions import RayActorError, RayTaskError
from ray.llm._internal.common.errors import VLLM_FATAL_ERRORS
from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest, CompletionRequest
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config import Serve
from serve.registry import Refused

RETRY_AFTER_S = 2
log = logging.getLogger("ray.serve")


class _Checked(BaseModel):
    """vLLM's own checks of a request raise what FastAPI takes for a failure of ours, TypeError for messages = null."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError:
            raise
        except Exception as error:
            raise ValueError(str(error)) from None


class ChatRequest(_Checked, ChatCompletionRequest):
    """The body of a chat."""


class TextRequest(_Checked, CompletionRequest):
    """The body of a completion."""


def make_http_app(settings: Serve) -> FastAPI:
    """Return an app without routes that limits requests and answers errors."""
    app = FastAPI(title="Corpus Distillery", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_kb << 10)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    for kind in (BackPressureError, RayActorError, RayServeException):
        app.add_exception_handler(kind, _on_busy)
    for kind in (RayTaskError, Exception):
        app.add_exception_handler(kind, _on_failure)
    return app


class BodyLimit:
    """Answer 413 to bodies over a limit; one without a length is read up to the limit before anyone else sees it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length")
        chunks: list[Message] = []
        size = int(length) if length and length.isdigit() else 0
        while size <= self._max_bytes and length is None:
            chunks.append(await receive())
            size += len(chunks[-1].get("body", b""))
            if not chunks[-1].get("more_body"):
                break
        if size > self._max_bytes:
            refused = Refused(413, "request_too_large", f"The request is larger than {self._max_bytes >> 10} KiB.")
            return await _error(refused.status, refused.code, refused.message)(scope, receive, send)

        async def replay() -> Message:
            return chunks.pop(0) if chunks else await receive()

        await self._app(scope, replay, send)


def error_body(status: int, code: str, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _error(status: int, code: str, message: str) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse(error_body(status, code, message), status_code=status, headers=headers)


def _on_refused(request: Request, error: Any) -> Response:
    return _error(error.status, error.code, error.message)


def _on_invalid(request: Request, error: Any) -> Response:
    details = error.errors()
    where = ".".join(str(part) for part in details[0]["loc"]) if details else "body"
    return _error(400, "invalid_request", f"{where}: {details[0]['msg'] if details else 'is not valid'}")


def _on_http(request: Request, error: Any) -> Response:
    return _error(error.status_code, "http_error", str(error.detail))


def _on_busy(request: Request, error: Any) -> Response:
    return _error(503, "service_unavailable", "The service is busy or restarting; ask again.")


def _on_failure(request: Request, error: Any) -> Response:
    if isinstance(error, TimeoutError):
        return _error(503, "timeout", "No answer in time; ask again.")
    if isinstance(getattr(error, "cause", None), VLLM_FATAL_ERRORS):
        return _on_busy(request, error)
    if isinstance(error, OSError):
        log.warning("%s %s: the registry cannot be read: %s", request.method, request.url.path, error)
        return _on_busy(request, error)
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error(500, "internal_error", "Something went wrong on our side; the log says what.")
