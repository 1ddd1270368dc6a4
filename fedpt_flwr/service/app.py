"""The HTTP interface: what OpenAI's clients speak, and a page to look at.

A route turns a request's body into tasks for the scheduler and its events into the answer, as they come or at the end.
Whatever is wrong with a request is an error object of OpenAI's form. A client that goes away takes its tasks along.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from fedpt_flwr.data import tokenize_prompts
from fedpt_flwr.errors import DataError
from fedpt_flwr.service import schemas
from fedpt_flwr.service.answers import Answer, ChatAnswer, LegacyAnswer
from fedpt_flwr.service.chat import render_chat
from fedpt_flwr.service.guard import NO_STORE, ClientGone, Guard, Service, error_response
from fedpt_flwr.service.scheduler import Event, QueueFull, Settings, Stopping, Task
from fedpt_flwr.service.schemas import OpenAIError
from fedpt_flwr.service.versions import Version

_LONG_TEXT = 20_000
"""Characters from which a text is tokenised in another thread, so that other requests go on."""


def create_app(service: Service, *, on_start: Callable[[asyncio.AbstractEventLoop], None]) -> FastAPI:
    """The application.

    Args:
        service: What it answers with.
        on_start: Called with the event loop before the first request.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        on_start(asyncio.get_running_loop())
        yield

    app = FastAPI(
        title="fedpt-flwr: proxy-decoding service",
        version=service.scheduler.version.name,
        lifespan=lifespan,
        redirect_slashes=False,  # to an address that would be made from what the client calls us
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Guard, service=service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(OpenAIError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.ErrorBody} for status in ("4XX", 400, 401, 404, 408, 413, 415, 429, 503)
    }
    legacy = {"model": schemas.Completion, "content": schemas.event_stream(schemas.CompletionChunk)}
    chat = {"model": schemas.ChatCompletion, "content": schemas.event_stream(schemas.ChatCompletionChunk)}

    @app.post("/v1/completions", response_model=None, responses={200: legacy, **errors})
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        version = service.scheduler.version
        prompts = await _all_ids(service, body.prompts, version)
        answer = LegacyAnswer(body, version, prompts)
        return await _answer(service, request, body, version, prompts, answer)

    @app.post("/v1/chat/completions", response_model=None, responses={200: chat, **errors})
    async def chat_completions(body: schemas.ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        version = service.scheduler.version
        prompt = render_chat(body.messages, version.tokenizer if version.is_chat else None, version.template)
        prompts = await _all_ids(service, [prompt], version)
        return await _answer(service, request, body, version, prompts, ChatAnswer(body, version, prompts))

    @app.get("/v1/models")
    async def models() -> schemas.ModelList:
        """The models that can be asked."""
        return schemas.ModelList(data=[schemas.Model(id=name, created=service.started) for name in schemas.MODELS])

    @app.get("/v1/models/{name}", responses=errors)
    async def model(name: str) -> schemas.Model:
        """One of the models."""
        schemas.check_model(name)
        return schemas.Model(id=name, created=service.started)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """What the page shows of the run."""
        version = service.scheduler.version
        return {
            "version": version.name,
            "run": version.run,
            "round": version.server_round,
            "alpha": version.proxy.alpha,
            "plausibility": version.proxy.plausibility,
            "template": version.template.text,
            "max_tokens": min(version.max_new_tokens, service.config.max_new_tokens),  # what may be asked for
            "context": version.context,
            "vocabulary": version.vocabulary,
            "full_logprobs": service.config.max_full_logprobs,
            "scores": version.scores,
            "examples": version.examples,
        }

    @app.head("/health", include_in_schema=False)  # some balancers ask so
    @app.get("/health", responses={503: {}})
    async def health() -> JSONResponse:
        """Whether requests are taken on."""
        status = "stopping" if service.stopping else "ready"
        content = {"status": status, "version": service.scheduler.version.name}
        return JSONResponse(content, status_code=503 if service.stopping else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = (resources.files("fedpt_flwr.service") / "playground.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"content-security-policy": policy, "cache-control": "no-store"}
        return HTMLResponse(page.replace("{{nonce}}", nonce), headers=headers)

    return app


# --- a request ----------------------------------------------------------------------------------------------------


async def _all_ids(service: Service, prompts: Sequence[str | Sequence[int]], version: Version) -> list[list[int]]:
    """Prompts as token ids; long texts do not keep other requests waiting."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    longest = max(map(len, texts), default=0)
    if version.max_prompt_chars is not None and longest > version.max_prompt_chars:  # before it costs anything
        raise _too_long(f"a prompt of {longest} characters cannot fit the models' context of {version.context} tokens")
    work = partial(_read_prompts, prompts, version)
    if sum(map(len, texts)) <= _LONG_TEXT:
        return work()
    async with service.tokenising:
        return await asyncio.to_thread(work)


def _read_prompts(prompts: Sequence[str | Sequence[int]], version: Version) -> list[list[int]]:
    return [_prompt_ids(prompt, version) for prompt in prompts]


def _prompt_ids(prompt: str | Sequence[int], version: Version) -> list[int]:
    """A prompt, text or ids, as token ids."""
    if not isinstance(prompt, str):
        if (largest := max(prompt)) >= version.vocab_size:
            raise OpenAIError(
                400, f"token ids of a prompt must be below {version.vocab_size}, got {largest}", param="prompt"
            )
        return _readable(list(prompt), version)
    try:
        ids = tokenize_prompts([prompt], version.tokenizer, max_length=None)[0]
    except DataError as error:
        raise OpenAIError(400, str(error), param="prompt") from error
    if not ids:
        raise OpenAIError(400, "the prompt must hold at least one token", param="prompt")
    return _readable(ids, version)


def _readable(ids: list[int], version: Version) -> list[int]:
    if unreadable := version.unreadable(ids):
        token = version.tokenizer.convert_ids_to_tokens(unreadable[0])
        raise OpenAIError(400, f"the large model has no token {token!r}", param="prompt", code="invalid_value")
    return ids


def _too_long(sentence: str, param: str = "prompt") -> OpenAIError:
    return OpenAIError(400, sentence, param=param, code="context_length_exceeded")


def _max_new_tokens(asked: int | None, default: int | None, longest_prompt: int, version: Version, limit: int) -> int:
    """How long an answer may get."""
    context = version.context or longest_prompt + limit
    room = context - longest_prompt
    if asked is not None and asked > limit:
        raise OpenAIError(400, f"max_tokens must be at most {limit} here, got {asked}", param="max_tokens")
    if room < (1 if asked is None else asked):
        raise _too_long(
            f"the models' context is {context} tokens; the prompt has {longest_prompt}"
            + (f" and {asked} were asked for" if asked else "")
            + "; shorten the prompt or lower max_tokens",
            "messages" if default is None else "prompt",
        )
    return min(room, limit, default or limit) if asked is None else asked


def _num_full(
    service: Service,
    body: schemas.CompletionRequest | schemas.ChatCompletionRequest,
    version: Version,
    prompt_length: int,
) -> int:
    """Places after which all log-probabilities are asked for."""
    wanted = getattr(body, "full_logprobs", None) or 0
    if wanted > prompt_length:
        raise OpenAIError(
            400,
            f"full_logprobs must be at most the prompt's {prompt_length} tokens, got {wanted}",
            param="full_logprobs",
        )
    limit = service.config.max_full_logprobs
    if wanted * version.vocab_size > limit:
        raise OpenAIError(
            400,
            f"full_logprobs times the {version.vocab_size} tokens of the vocabulary must be at most {limit} here, got "
            f"{wanted}",
            param="full_logprobs",
            code="too_many_logprobs",
        )
    return wanted


async def _answer(
    service: Service,
    request: Request,
    body: schemas.CompletionRequest | schemas.ChatCompletionRequest,
    version: Version,
    prompts: Sequence[Sequence[int]],
    answer: Answer,
) -> Response:
    """Have texts written and answer with them."""
    schemas.check_model(body.model)
    slots = service.scheduler.limits.num_slots
    if body.n > slots:
        raise OpenAIError(400, f"n must be at most {slots} here, got {body.n}", param="n")
    settings = Settings(
        model=body.model,
        alpha=version.proxy.alpha if body.alpha is None else body.alpha,
        plausibility=version.proxy.plausibility if body.plausibility is None else body.plausibility,
        temperature=body.temperature,
        top_p=body.top_p,
        max_new_tokens=_max_new_tokens(
            body.max_new_tokens,
            answer.default_max_tokens,
            max(map(len, prompts)),
            version,
            service.config.max_new_tokens,
        ),
        stop=body.stop_strings,
        num_top=body.num_top,
        details=body.details,
        score_prompt=answer.scores_prompt,
        num_full=_num_full(service, body, version, len(prompts[0])),
    )
    seed = secrets.randbits(63) if body.seed is None else body.seed
    events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
    tasks = [
        Task(
            prompt_ids=ids,
            settings=settings,
            version=version,
            seeds=[seed + number * body.n + index for index in range(body.n)],
            sink=partial(_put, events, number),
            deadline=time.monotonic() + service.config.request_timeout_s,
        )
        for number, ids in enumerate(prompts)
    ]
    record = request.scope["fedpt.record"]
    record |= {"model": body.model, "version": version.name, "prompt_tokens": answer.prompt_tokens}
    if service.config.log_prompts:
        record["prompts"] = [version.tokenizer.decode(ids) for ids in prompts]
    try:
        service.scheduler.submit(tasks)
    except QueueFull as error:
        headers = {"retry-after": str(error.retry_after_s)}
        raise OpenAIError(
            429,
            f"too many requests are waiting; try again in {error.retry_after_s} s",
            type="rate_limit_exceeded",
            code="rate_limit_exceeded",
            headers=headers,
        ) from error
    except Stopping as error:
        raise _stopping() from error
    service.metrics.prompt_tokens.labels(body.model).inc(answer.prompt_tokens)
    writing = _Writing(service, tasks, events, answer, record)
    if body.stream:
        return EventStream(writing)
    return await writing.whole(request.receive)


def _put(events: asyncio.Queue[tuple[int, Event] | None], number: int, event: Event) -> None:
    events.put_nowait((number, event))


class _Writing:
    """Texts that are being written for one request."""

    def __init__(
        self,
        service: Service,
        tasks: Sequence[Task],
        events: asyncio.Queue[tuple[int, Event] | None],
        answer: Answer,
        record: dict[str, Any],
    ) -> None:
        self._service = service
        self._tasks = tasks
        self._events = events
        self._answer = answer
        self._record = record

    async def whole(self, receive: Receive) -> Response:
        """The answer, once all of it is there."""
        async with self._following(receive):
            async for number, event in self._incoming():
                self._answer.add(number, event)
        return JSONResponse(self._answer.whole(), headers=NO_STORE)

    async def pieces(self, receive: Receive) -> AsyncIterator[bytes]:
        """The answer as server-sent events, as it comes."""
        async with self._following(receive):
            try:
                for chunk in self._answer.first_chunks():
                    yield _sse(chunk)
                async for number, event in self._incoming():
                    for chunk in self._answer.chunks(number, event):
                        yield _sse(chunk)
                for chunk in self._answer.last_chunks():
                    yield _sse(chunk)
            except OpenAIError as error:  # the status has been sent already
                self._record["outcome"] = error.code or error.type
                yield _sse(error.body())
            yield b"data: [DONE]\n\n"

    @asynccontextmanager
    async def _following(self, receive: Receive) -> AsyncIterator[None]:
        """Notice when the client goes, and leave nothing behind in the scheduler however this ends."""
        watch = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watch.cancel()
            self._service.scheduler.cancel(self._tasks)
            self._record["completion_tokens"] = self._answer.completion_tokens

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def _incoming(self) -> AsyncIterator[tuple[int, Event]]:
        """Events until all texts are complete."""
        while not self._answer.complete:
            item = await self._events.get()
            if item is None:
                raise ClientGone
            yield item


class EventStream(Response):
    """Server-sent events. Starlette's own streaming would take the disconnect messages for itself."""

    media_type = "text/event-stream"

    def __init__(self, writing: _Writing) -> None:
        super().__init__(headers={**NO_STORE, "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._writing = writing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the events as they come."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._writing.pieces(receive):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _sse(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _stopping() -> OpenAIError:
    return OpenAIError(
        503, "the service is stopping", type="server_error", code="stopping", headers={"retry-after": "5"}
    )


async def _invalid(_: Request, error: Any) -> Response:
    return error_response(OpenAIError.from_validation(list(error.errors())))


async def _refused(_: Request, error: Any) -> Response:
    return error_response(error)


async def _http_error(request: Request, error: Any) -> Response:
    sentences = {
        400: "the body must be JSON, with numbers that can be read",
        404: f"there is nothing at {request.url.path}; the interface is at /v1/completions and /v1/chat/completions",
        405: f"{request.method} is not possible at {request.url.path}",
    }
    headers = dict(error.headers or {})
    return error_response(
        OpenAIError(error.status_code, sentences.get(error.status_code, str(error.detail)), headers=headers)
    )


async def _internal(_: Request, error: Exception) -> Response:
    return error_response(
        OpenAIError(
            500, f"the request failed ({type(error).__name__}); the service's log says more", type="server_error"
        )
    )
