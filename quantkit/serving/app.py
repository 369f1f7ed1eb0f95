"""The server's addresses, and who may use them."""

import asyncio
import hmac
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from quantkit.errors import InputError, OutputError, first_line
from quantkit.serving.chat import chat_completion, chat_stream, chat_turn
from quantkit.serving.requests import ChatRequest, ResponsesRequest
from quantkit.serving.responses import response_stream, response_turn, whole_response
from quantkit.serving.turns import RequestError, Service

_MOST = 32 << 20  # bytes of a request
_KEEP_ALIVE = 10.0  # seconds
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
T = TypeVar("T")
Asked = TypeVar("Asked", bound=BaseModel)


@dataclass(frozen=True)
class Address:
    """Where a server listens, and who may ask it.

    Other hosts than loopback need an `api_key`. Web pages may ask only from `origins`.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    origins: Sequence[str] = ()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in _LOOPBACK


def error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """Return an error in OpenAI's form."""
    return JSONResponse(_error_body(status, message, param, code), status)


def _error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """Refuses requests of foreign web pages, under foreign names, or without the key.

    A web page can reach a loopback server through a name of its own that it lets point there (DNS
    rebinding), so a loopback server answers to loopback names only.
    """

    def __init__(self, app: ASGIApp, address: Address) -> None:
        self._app, self._address = app, address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin is not None and origin in self._address.origins
        refusal = self._refusal(headers, allowed)
        if refusal is None and scope["method"] == "OPTIONS" and allowed:
            refusal = Response(status_code=204)  # browsers send no key with it
        elif refusal is None and not self._has_key(headers):
            refusal = error(401, "the API key is wrong or missing.", code="invalid_api_key")
        app = self._app if refusal is None else refusal
        if not allowed:
            await app(scope, receive, send)
            return
        asked = headers.get("access-control-request-headers", "authorization, content-type")
        cors = [
            (b"access-control-allow-origin", str(origin).encode()),
            (b"access-control-allow-headers", asked.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"vary", b"origin"),
        ]

        async def send_cors(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *cors]}
            await send(message)

        await app(scope, receive, send_cors)

    def _refusal(self, headers: Headers, allowed: bool) -> Response | None:
        address = self._address
        host = headers.get("host", "")
        if address.is_loopback and _name(host) not in _LOOPBACK:
            return error(403, "this server answers to localhost only.", code="forbidden_host")
        origin = headers.get("origin")
        if (
            origin is not None
            and not allowed
            and origin not in (f"http://{host}", f"https://{host}")
        ):
            return error(
                403, "web pages of this origin are not allowed; see --allow-origin.",
                code="forbidden_origin",
            )  # fmt: skip
        return None

    def _has_key(self, headers: Headers) -> bool:
        """Return whether a request has the key, in constant time."""
        key = self._address.api_key
        given = headers.get("authorization", "").removeprefix("Bearer ")
        return key is None or hmac.compare_digest(given.encode("utf-8", "replace"), key.encode())


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


async def _body(request: Request, kind: type[Asked]) -> Asked:
    """Return a validated request. Raises RequestError and HTTPException."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST:
            raise HTTPException(413, f"a request has at most {_MOST >> 20} MB.")
    try:
        data = _clean(json.loads(bytes(body).decode("utf-8")))
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"the body is not JSON ({first_line(exc)}).") from exc
    if not isinstance(data, dict):
        raise RequestError("the body is not a JSON object.")
    try:
        return kind.model_validate(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise RequestError(f"{place}: {first['msg']}."[:400], place or None) from exc
    except RecursionError as exc:
        raise RequestError("the body is nested too deeply.") from exc


def _clean(data: Any) -> Any:
    """Return JSON without lone surrogates. Raises ValueError for infinities and NaN."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return json.loads(text.encode("utf-8", "replace"))


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, which ends when the client leaves."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        watch.cancel()
        task.cancel()


async def _kept_alive(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield events, and a comment where none comes for long; errors become an event."""
    ready: asyncio.Queue[str | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async for event in events:
                ready.put_nowait(event)
        except Exception as exc:  # noqa: BLE001  (a stream has to end legally)
            ready.put_nowait(f"data: {json.dumps(_error_body(500, str(exc)))}\n\n")
        finally:
            ready.put_nowait(None)

    async def tick() -> None:
        while True:
            await asyncio.sleep(_KEEP_ALIVE)
            if ready.empty():
                ready.put_nowait(": keep-alive\n\n")

    tasks = [asyncio.ensure_future(pump()), asyncio.ensure_future(tick())]
    try:
        while (event := await ready.get()) is not None:
            yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await events.aclose()  # type: ignore[attr-defined]


def _streamed(events: AsyncIterator[str]) -> Response:
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_kept_alive(events), 200, headers, "text/event-stream")


class _Endpoints:
    """The answers of a served model, by address."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        asked = await _body(request, ChatRequest)
        turn = await chat_turn(self._service, asked)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return _streamed(chat_stream(self._service, turn, usage=usage))
        return JSONResponse(await _unless_gone(request, chat_completion(self._service, turn)))

    async def responses(self, request: Request) -> Response:
        asked = await _body(request, ResponsesRequest)
        turn = await response_turn(self._service, asked)
        if asked.stream:
            return _streamed(response_stream(self._service, turn))
        return JSONResponse(await _unless_gone(request, whole_response(self._service, turn)))

    async def models(self, request: Request) -> Response:
        head = {"id": self._service.name, "object": "model", "created": self._service.since}
        model = {**head, "owned_by": "quantkit"}
        one = "name" in request.path_params
        return JSONResponse(model if one else {"object": "list", "data": [model]})

    async def health(self, _: Request) -> Response:
        alive = self._service.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)


def make_app(service: Service, address: Address) -> ASGIApp:
    """Return the application of a served model."""
    endpoints = _Endpoints(service)
    routes = [
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/responses", endpoints.responses, methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.models),
        Route("/health", endpoints.health),
    ]
    handlers: dict[Any, Any] = {
        RequestError: lambda _, exc: error(400, str(exc), exc.param, exc.code),
        OutputError: lambda _, exc: error(500, str(exc)),
        HTTPException: lambda _, exc: error(exc.status_code, str(exc.detail)),
        Exception: lambda *_: error(500, "the server failed; its log says how."),
        ClientDisconnect: lambda *_: Response(status_code=499),
    }
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=_watch(service))
    return Guard(app, address)


def _watch(service: Service) -> Callable[[Any], Any]:
    """Return a lifespan in which a dead generation thread ends the process."""

    async def watch() -> None:
        while service.engine.is_alive:
            await asyncio.sleep(1.0)
        print("error: the generation thread of mlx-lm ended.", file=sys.stderr, flush=True)
        os._exit(1)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        task = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            task.cancel()

    return lifespan


def require_address(address: Address) -> None:
    """Check that a server can listen here. Raises InputError."""
    if not address.is_loopback and not address.api_key:
        raise InputError(
            f"`host` {address.host}: other machines can reach it, so it needs an `api_key`."
        )
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.create_server((address.host, address.port), family=family):
            pass
    except (OSError, UnicodeError) as exc:
        raise InputError(
            f"{address.host}, port {address.port}: cannot be bound ({first_line(exc)}). Give "
            "another `port` or `host`."
        ) from exc


def end_at_once() -> None:
    """Let Ctrl-C and SIGTERM end the process: mlx-lm's thread may be deep in a load or a prompt."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))


def run(service: Service, address: Address) -> None:
    """Serve until the process is told to end, which it does at once."""

    class Server(uvicorn.Server):
        def handle_exit(self, *_: Any) -> None:
            os._exit(0)

    # The generation thread should not wait 5 ms for the interpreter while answers are written.
    sys.setswitchinterval(0.0005)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("quantkit.serve").setLevel(logging.INFO)
    config = uvicorn.Config(
        make_app(service, address),
        host=address.host,
        port=address.port,
        log_level="warning",
        access_log=False,
        server_header=False,
    )
    with suppress(SystemExit):  # the port was taken meanwhile, as uvicorn has said
        Server(config).run()
    os._exit(2)  # mlx-lm's thread would keep the process alive
