"""An endpoint like OpenAI's for one machine and few users.

    python -m serve --model FOLDER [--host 127.0.0.1] [--port 8000] [--api-key KEY]

    POST /v1/chat/completions    whole or streamed (server-sent events)
    GET  /v1/models              the one model
    GET  /health                 no key needed

One request is computed at a time and the others wait in a bounded queue, so many users need an engine that batches: vLLM
or SGLang, see README. Needs `pip install -r requirements-serve.txt`.
"""

import argparse
import asyncio
import contextlib
import hmac
import ipaddress
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise SystemExit(f"python -m serve needs `pip install -r requirements-serve.txt` ({error})") from None

from .api import (
    Answer,
    ApiError,
    ChatRequest,
    Limits,
    api_error,
    delta_of_event,
    model_of,
    models_of,
    prepare,
    read_request,
    to_bytes,
)
from .engine import Completion, Engine, Job, load

log = logging.getLogger("kimi.serve")

KEEP_ALIVE_S = 10.0  # between two comments on a stream whose request waits in the queue
NUM_READERS = 2  # threads that fetch and decode media
NOTICE = (
    "This server answers one request at a time: it is for one machine and few users. For more, serve the same folder with\n"
    "  vllm serve FOLDER --trust-remote-code --tool-call-parser kimi_k2 --enable-auto-tool-choice"
    " --reasoning-parser kimi_k2 --mm-encoder-tp-mode data\n"
    "  python -m sglang.launch_server --model-path FOLDER --trust-remote-code --tool-call-parser kimi_k2"
    " --reasoning-parser kimi_k2"
)


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_bytes(content)


class Service:
    """The handlers and their common state."""

    def __init__(self, engine: Engine, name: str, api_key: str | None, limits: Limits, loopback_only: bool):
        self.engine, self.name, self.limits = engine, name, limits
        self.api_key, self.loopback_only = api_key, loopback_only
        self.created = int(time.time())
        self.readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="kimi-reader")

    # Requests

    async def models(self, request: Request) -> Response:
        self.check_caller(request)
        return JSON(models_of(self.name, self.created, self.engine.max_context))

    async def model(self, request: Request) -> Response:
        self.check_caller(request)
        if request.path_params["name"] != self.name:
            raise ApiError(404, f"This server has the model {self.name!r} only.", "model", "model_not_found")
        return JSON(model_of(self.name, self.created, self.engine.max_context))

    async def health(self, request: Request) -> Response:
        return JSON({"status": "ok", "admitted": self.engine.num_admitted, "places": self.engine.num_places})

    async def chat(self, request: Request) -> Response:
        """A place in the queue first, or 429: without one nothing of a request is read, and no picture decoded."""
        self.check_caller(request)
        self.engine.admit()
        place = contextlib.ExitStack()
        place.callback(self.engine.leave)
        try:
            asked, warnings = read_request(await self.read_body(request), self.name)
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(
                self.readers, prepare, self.engine, asked, self.limits, warnings
            )
            events: asyncio.Queue[Any] = asyncio.Queue()

            def emit(item: Any) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no reader
                    loop.call_soon_threadsafe(events.put_nowait, item)

            job = self.engine.submit(Job(prompt, asked.sampling, emit))
            place.callback(job.cancel)
            headers = {"X-Kimi-Warning": "; ".join(warnings)} if warnings else {}
            watch = asyncio.create_task(cancel_when_gone(request, job, events))
            place.callback(watch.cancel)
            if asked.stream:
                return Streamed(self.chunks(asked, events), place.pop_all(), headers)
            return JSON(await self.whole(asked, events), headers=headers)
        finally:
            place.close()

    def check_caller(self, request: Request) -> None:
        """Raises ApiError for a wrong key; and, where only this machine is served, for a page of another site that
        reached it by a name of its own (DNS rebinding)."""
        if self.loopback_only and not is_loopback(request.url.hostname or ""):
            raise ApiError(
                403, f"This server answers to 127.0.0.1 and localhost, not to {request.url.hostname!r}."
            )
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are bytes, which starlette decodes as latin-1.
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            what = "The API key is wrong" if given else "No API key was given"
            raise ApiError(
                401,
                f"{what}; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                kind="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def read_body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a form of another site can send without asking is not
            raise ApiError(400, f"The Content-Type must be application/json, not {kind!r}.")
        limit = self.limits.max_body_bytes
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced.isdigit() else 0
        chunks: list[bytes] = []
        if size <= limit:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    break
                chunks.append(chunk)
        if size > limit:
            raise ApiError(
                413,
                f"The body has {size} bytes or more, and the limit is {limit}.",
                code="request_too_large",
                headers={"Connection": "close"},
            )
        return b"".join(chunks)

    # Answers

    async def whole(self, asked: ChatRequest, events: asyncio.Queue[Any]) -> dict[str, Any]:
        while not isinstance(item := await events.get(), Completion):
            if isinstance(item, Exception):
                raise item
        log_answer(asked, item)
        return Answer(self.name).whole(item)

    async def chunks(self, asked: ChatRequest, events: asyncio.Queue[Any]) -> AsyncIterator[bytes]:
        """The server-sent events of an answer."""
        answer, with_usage = Answer(self.name), asked.include_usage

        def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
            return sse(answer.chunk(delta, reason, with_usage))

        yield chunk({"role": "assistant", "content": ""})
        while True:
            try:
                item = await asyncio.wait_for(events.get(), KEEP_ALIVE_S)
            except asyncio.TimeoutError:  # another class on Python 3.10
                yield b": waiting\n\n"
                continue
            if isinstance(item, Exception):
                yield sse(api_error(item).body())
                break
            if isinstance(item, Completion):
                log_answer(asked, item)
                yield chunk({}, item.finish_reason)
                if with_usage:
                    yield sse(answer.usage_chunk(item))
                break
            if (delta := delta_of_event(item)) is not None:
                yield chunk(delta)
        yield b"data: [DONE]\n\n"


class Streamed(StreamingResponse):
    """Server-sent events that release their place in the queue at the end, however they end."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], place: contextlib.ExitStack, headers: dict[str, str]):
        super().__init__(chunks, headers={"Cache-Control": "no-cache", **headers})
        self.place = place

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.place:
            await super().__call__(scope, receive, send)


def log_answer(asked: ChatRequest, done: Completion) -> None:
    """One line per answer, without any text of the conversation."""
    log.info(
        "%s, %d messages, %d tools: %d tokens read (%d cached), %d written, %s, %.1f s",
        "streamed" if asked.stream else "whole",
        len(asked.messages),
        len(asked.tools or []),
        done.prompt_tokens,
        done.cached_tokens,
        done.completion_tokens,
        done.finish_reason,
        done.seconds,
    )


def sse(value: dict[str, Any]) -> bytes:
    return b"data: " + to_bytes(value) + b"\n\n"


class Gone(ApiError):
    """The client closed the connection, so this is not sent."""

    def __init__(self) -> None:
        super().__init__(499, "The client closed the connection.", kind="client_closed_request")


async def cancel_when_gone(request: Request, job: Job, events: asyncio.Queue[Any]) -> None:
    """Cancels the job once the connection is closed, and wakes whoever waits for its events."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()
    events.put_nowait(Gone())


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def make_app(
    engine: Engine,
    name: str,
    api_key: str | None = None,
    limits: Limits | None = None,
    loopback_only: bool = True,
) -> FastAPI:
    """The app. `loopback_only`: it is bound to this machine alone, and requests for other host names are refused."""
    service = Service(engine, name, api_key, limits or Limits(), loopback_only)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.readers.shutdown(wait=False, cancel_futures=True)
        await asyncio.get_running_loop().run_in_executor(None, engine.close)

    app = FastAPI(title="Kimi K2.7 Code", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", service.chat),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{name:path}", service.model),
        ("GET", "/health", service.health),
    ]
    for method, path, handler in routes:
        app.router.add_route(path, guarded(handler), methods=[method])
    app.add_exception_handler(HTTPException, refuse)  # of the router: no such path, no such method
    return app


def guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The handler, with every exception answered: one that is not caught here would close the connection."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            return await refuse(request, error)

    return answer


async def refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
    elif isinstance(error, ClientDisconnect):
        error = Gone()
    answer = api_error(error)
    if answer.status == 500:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSON(answer.body(), answer.status, headers=answer.headers)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--name", help="what requests call the model; by default the folder's name")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to bind to; 0.0.0.0 opens it to the network"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--api-key",
        default=os.environ.get("KIMI_API_KEY") or None,
        help="what clients must send; better given as KIMI_API_KEY, since arguments can be seen by others",
    )
    parser.add_argument("--max-waiting", type=int, default=64, help="requests that wait; one more gets 429")
    parser.add_argument(
        "--max-context", type=int, help="tokens of prompt and answer; the model's own by default"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=32768, help="of an answer to a request that names none"
    )
    parser.add_argument("--max-body-mib", type=int, default=64, help="of a request, pictures included")
    parser.add_argument(
        "--conversations", type=int, default=8, help="caches kept for the next turn; 0 for none"
    )
    parser.add_argument("--cached-tokens", type=int, default=262144, help="that these caches hold together")
    parser.add_argument(
        "--allow-media-host",
        action="append",
        default=[],
        metavar="HOST",
        help="a loopback or private host from which pictures may be fetched (none otherwise)",
    )
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if not args.model.is_dir():
        sys.exit(f"--model: there is no folder {args.model}")
    model, processor = load(args.model)
    engine = Engine(
        model,
        processor,
        max_waiting=args.max_waiting,
        max_context=args.max_context,
        default_max_tokens=args.max_tokens,
        max_caches=args.conversations,
        max_cached_tokens=args.cached_tokens,
    )
    name = args.name or args.model.resolve().name
    limits = Limits(args.max_body_mib * 2**20, args.max_body_mib * 2**20, tuple(args.allow_media_host))
    loopback = is_loopback(args.host)
    app = make_app(engine, name, args.api_key, limits, loopback)
    print(NOTICE.replace("FOLDER", str(args.model)), flush=True)
    if not loopback and not args.api_key:
        print(
            f"Warning: bound to {args.host} without --api-key: whoever reaches this port can use it.",
            flush=True,
        )
    print(f"Model {name!r}, {engine.max_context} tokens, at http://{args.host}:{args.port}/v1", flush=True)
    # One worker whatever WEB_CONCURRENCY says: there is one model.
    settings = {"host": args.host, "port": args.port, "workers": 1}
    uvicorn.run(app, **settings, log_level="warning", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
