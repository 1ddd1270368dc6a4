"""What stands before every route: who may come in, how large a body may be, and the line in the log at the end."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedpt_flwr.service.logs import log_request
from fedpt_flwr.service.metrics import Metrics
from fedpt_flwr.service.scheduler import Scheduler
from fedpt_flwr.service.schemas import OpenAIError

NO_STORE = {"cache-control": "no-store"}

_ENDPOINTS = frozenset(
    {"/", "/health", "/info", "/metrics", "/openapi.json", "/v1/chat/completions", "/v1/completions", "/v1/models"}
)
"""Paths that are counted by name: whoever asks for others must not make the metrics grow."""

_MAX_BODY_BYTES = 4 << 20
_BODY_TIMEOUT_S = 30.0


class ClientGone(Exception):
    """Nobody is there to be answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """What the operator decides."""

    api_keys: Sequence[str] = ()
    """Any of them opens everything; none: everything is open."""
    max_new_tokens: int = 4096
    """Longest answer that may be asked for, where the models' context is not shorter."""
    max_full_logprobs: int = 1 << 22
    """Numbers that ``full_logprobs`` may ask for in a request: positions times vocabulary; 0: none."""
    request_timeout_s: float = 600.0
    """Until a request must be done."""
    log_prompts: bool = False
    hosts: frozenset[str] = frozenset()
    """Names by which the service may be called; none: by any."""


@dataclass(kw_only=True)
class Service:
    """What all requests share."""

    scheduler: Scheduler
    metrics: Metrics
    config: ServiceConfig
    tokenising: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    """Long texts are tokenised in other threads, few at once: it takes fifty times their memory."""
    started: int = field(default_factory=lambda: int(time.time()))
    stopping: bool = False


class Guard:
    """Lets in who has a key and bodies that can be read; logs and counts every request when it has ended.

    Args:
        app: What is guarded.
        service: What all requests share.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = [key.encode() for key in service.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        request_id = f"req-{secrets.token_hex(8)}"
        record: dict[str, Any] = {"id": request_id, "method": scope["method"], "path": scope["path"]}
        scope["fedpt.record"] = record

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.setdefault("status", message["status"])
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            self._check_host(scope)
            self._check_key(scope)
            if scope["method"] == "POST":
                receive = await _whole_body(scope, receive)
            await self._app(scope, receive, sending)
        except OpenAIError as error:
            await error_response(error)(scope, receive, sending)
        except ClientGone:
            record["outcome"] = "client gone"
        except asyncio.CancelledError:
            record["outcome"] = "cancelled"
            raise
        finally:
            record["seconds"] = round(time.monotonic() - begun, 4)
            record.setdefault("outcome", "ok" if record.get("status", 500) < 400 else str(record.get("status", 500)))
            endpoint = scope["path"] if scope["path"] in _ENDPOINTS else "other"
            self._service.metrics.requests.labels(endpoint, record["outcome"]).inc()
            log_request(record)

    def _check_host(self, scope: Scope) -> None:
        """Keep out pages of other sites that have let their own name point at this machine (DNS rebinding)."""
        called = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = called.rpartition(":")[0] if called.rpartition(":")[2].isdecimal() else called
        if self._service.config.hosts and name.strip("[]").lower() not in self._service.config.hosts:
            raise OpenAIError(
                403,
                f"this service does not go by the name {name[:100]!r}; `fedpt serve --allow-host NAME` lets it",
                type="permission_error",
                code="unknown_host",
            )

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] == "/health":
            return
        headers = dict(scope["headers"])
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":  # what a browser sends that was asked for a password
            try:
                given = b64decode(given, validate=True).partition(b":")[2]
            except Base64Error:
                given = b""
        elif kind.lower() != b"bearer":
            given = b""
        # All keys, whichever fits: the time says nothing about them.
        fits = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if not any(fits):
            asks = 'Basic realm="fedpt", charset="UTF-8"' if scope["path"] == "/" else "Bearer"
            raise OpenAIError(
                401,
                "this service needs an API key: send the header Authorization: Bearer KEY",
                type="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": asks},
            )


async def _whole_body(scope: Scope, receive: Receive) -> Receive:
    """Read a request's body, within bounds of size and time; a ``receive`` that gives it again."""
    headers = dict(scope["headers"])
    content_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    # Also what keeps other sites' pages from using a service on this machine: they may not send JSON unasked.
    if content_type != b"application/json":
        raise OpenAIError(
            415,
            f"the content type must be application/json, got {content_type.decode('latin-1') or 'none'}",
            headers={"connection": "close"},
        )
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise OpenAIError(415, "the body must not be compressed", headers={"connection": "close"})
    too_large = OpenAIError(
        413, f"a request's body must be at most {_MAX_BODY_BYTES} bytes", headers={"connection": "close"}
    )
    if (announced := headers.get(b"content-length", b"")).isdigit() and int(announced) > _MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > _MAX_BODY_BYTES:
                    raise too_large
                if not message.get("more_body", False):
                    break
    except TimeoutError as error:
        raise OpenAIError(
            408, f"a request's body must arrive within {_BODY_TIMEOUT_S:.0f} s", headers={"connection": "close"}
        ) from error
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise OpenAIError(400, f"the body must be UTF-8 ({error.reason} at byte {error.start})") from error
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return again


def error_response(error: OpenAIError) -> JSONResponse:
    """An error as clients expect it."""
    return JSONResponse(error.body(), status_code=error.status, headers={**NO_STORE, **(error.headers or {})})
