"""The HTTP server of experiments.serve, on aiohttp: the OpenAI API's chat completions, completions and models, a page to chat on at /,
/health and /metrics."""

import asyncio
import dataclasses
import errno
import hmac
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus

from aiohttp import web

from experiments.serve import page
from experiments.serve.engine import Full, Job, report
from experiments.serve.metrics import KINDS, Metrics, Timer
from experiments.serve.refused import Refused
from experiments.serve.replies import Choice, Reply, error, event
from experiments.serve.requests import number_of, parse
from qwen3 import template
from qwen3.engine import Request
from qwen3.schema import short

BODY_S = 30  # seconds that a request's body may take to arrive
CONNECTIONS, IDLE_S = 1000, 60.0  # default limits of connections: their number, and seconds without a request at work
LOOK_S, RETRY_S = 0.05, 0.2  # seconds between two looks at connections; after accept() failed
BEHIND = 1 << 15  # tokens that a stream may be behind the engine; a client that reads more slowly is cut off
BACKLOG = 128  # connections that wait to be accepted
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
OPEN = ("/health", "/")  # paths that need no key; the page asks for one where it is needed
GONE_STATUS = 499  # in /metrics, of a client that went away before its answer ended
ROUTES = dict(zip((CHAT, COMPLETION), KINDS))  # path -> kind of request
PARSERS, RENDERERS = 2, 4  # threads that check and tokenize completions, and chats, which may wait for a template


@dataclasses.dataclass(frozen=True)
class Settings:
    """The server's settings. model: the model's name in requests. length: the most tokens of a prompt and its answer together.
    stop_ids: token ids that end an answer. slots: rows of the engine. max_body: bytes. keys: the accepted API keys; empty needs none.
    hosts: host names that requests may name, such as ("localhost",); None accepts any. defaults: options that requests may leave out, see
    experiments/generate/defaults.py. forms: a qwen3.answers.Forms; None: those of the chat template. compiler: a
    qwen3.grammars.Grammars, or None. adapters: further names of models, in the order of the engine's adapters."""

    model: str
    tokenizer: object
    length: int
    stop_ids: tuple
    slots: int
    max_body: int
    keys: tuple = ()
    hosts: tuple | None = None
    defaults: dict = dataclasses.field(default_factory=dict)
    forms: object = None
    compiler: object = None
    adapters: tuple = ()


class Stream(web.StreamResponse):
    """broken: whether the client went away before the end."""

    broken = False


class Server:
    """The request handlers. worker: an experiments.serve.engine.Worker, whose engine runs in another thread. most_connections, idle_s: see
    Gate; idle_s is also how long a client may leave its stream unread."""

    def __init__(self, settings, worker, most_connections=CONNECTIONS, idle_s=IDLE_S):
        self.settings, self.worker = settings, worker
        self.most_connections, self.idle_s, self.working = most_connections, idle_s, set()  # transports of requests at work
        self.last = weakref.WeakKeyDictionary()  # transport -> when its last request ended, or when it was accepted
        self.draining, self.idle, self.answering = False, asyncio.Event(), set()  # idle: no request is being answered
        self.idle.set()
        self.parsers = {"completion": ThreadPoolExecutor(PARSERS, "parse"), "chat": ThreadPoolExecutor(RENDERERS, "chat")}
        self.metrics, self.page = Metrics(worker, settings.slots), page.load()
        self.turns = weakref.WeakValueDictionary()  # (client, kind of request) -> the lock of the thread that it may use

    def app(self):
        app = web.Application(client_max_size=self.settings.max_body, middlewares=[self._as_json, self._only_by_name, self._only_with_key])
        app.add_routes(
            [
                web.post(CHAT, self.chat, expect_handler=expected),
                web.post(COMPLETION, self.completion, expect_handler=expected),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{name:.+}", self.model),
                web.get("/", self.chat_page),
                web.get("/health", self.health),
                web.get("/metrics", self.measured),
            ]
        )
        return app

    @web.middleware
    async def _as_json(self, request, handler):
        """Answers every error as OpenAI's JSON. Details of an internal error go to the log only."""
        transport, status = request.transport, GONE_STATUS
        self.working.add(transport)
        try:
            answer = await handler(request)
            status = GONE_STATUS if getattr(answer, "broken", False) else answer.status
            return answer
        except Refused as refused:
            status, details = refused.status, (str(refused), refused.param, refused.code)
        except Full:
            status, details = 429, ("the queue of requests is full; try again later", None, "queue_full")
        except web.HTTPRequestEntityTooLarge:
            status, details = 413, (f"the body is larger than {self.settings.max_body} bytes", None, "body_too_large")
        except web.HTTPException as found:
            status, details = found.status, (found.reason, None, None)
        except Exception as failed:
            report(failed)
            status, details = 500, ("the server failed; see its log", None, "internal_error")
        finally:
            self.working.discard(transport)
            self.last[transport] = asyncio.get_running_loop().time()
            if kind := ROUTES.get(request.path):
                self.metrics.requests.labels(kind, status).inc()
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        return web.json_response(error(*details, status), status=status, headers=headers)

    @web.middleware
    async def _only_by_name(self, request, handler):
        """Refuses a request whose Host is not in settings.hosts. Without this check, a web page whose DNS name points to this address
        (DNS rebinding) could send requests, as its browser takes the server for the page's own."""
        hosts = self.settings.hosts
        try:
            host = request.url.host
        except ValueError as wrong:
            raise Refused("the Host header is not a host name with, perhaps, a port", code="wrong_host") from wrong
        if hosts is not None and host not in hosts:
            raise Refused(f"the host of the request must be {' or '.join(hosts)}", status=403, code="wrong_host")
        return await handler(request)

    @web.middleware
    async def _only_with_key(self, request, handler):
        keys, given = self.settings.keys, request.headers.get("Authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
        if keys and request.path not in OPEN and not any([hmac.compare_digest(given, key.encode()) for key in keys]):
            raise Refused(
                "the API key is missing or unknown; send a known one as Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )
        return await handler(request)

    async def health(self, request):
        held = len(self.worker.held)
        body = {"status": "draining" if self.draining else "ok", "requests": held, "slots": self.settings.slots, "most": self.worker.most}
        return web.json_response(body, status=503 if self.draining else 200)

    def _described(self, name):
        of_adapter = {"parent": self.settings.model} if name != self.settings.model else {}
        return {"id": name, "object": "model", "created": 0, "owned_by": "local", "max_model_len": self.settings.length, **of_adapter}

    async def models(self, request):
        names = (self.settings.model, *self.settings.adapters)
        return web.json_response({"object": "list", "data": [self._described(name) for name in names]})

    async def model(self, request):
        name = request.match_info["name"]
        number_of(name, self.settings.model, self.settings.adapters)
        return web.json_response(self._described(name))

    async def chat_page(self, request):
        body, headers = self.page
        return web.Response(body=body, headers=headers)

    async def measured(self, request):
        body, kind = self.metrics.text()
        return web.Response(body=body, headers={"Content-Type": kind})

    async def chat(self, request):
        return await self.complete(request, "chat")

    async def completion(self, request):
        return await self.complete(request, "completion")

    async def complete(self, request, kind):
        if self.draining:
            raise Refused("the server is shutting down; try again later", status=503, code="draining")
        timer = Timer(self.metrics)
        asked = await self._asked(request, kind)
        events, jobs = asyncio.Queue(), []
        for prompt in asked.prompts:
            for sample in range(asked.n):
                put = partial(self._put, request, events, len(jobs), asked.stream)
                wanted = Request(prompt=prompt, sample=sample, **asked.options)
                jobs.append(Job(wanted, put, asked.stream, client=self._client(request), group=events))
        self.worker.submit(jobs)
        self.metrics.prompt_tokens.inc(asked.prompt_tokens)
        self.answering.add(events)
        self.idle.clear()
        try:
            choices, reply = [Choice(self.settings.tokenizer, asked) for _ in jobs], Reply(kind, asked.model, asked)
            pushed = self._pushed(jobs, choices, events, timer)
            if asked.stream:
                return await self._streamed(request, choices, pushed, reply)
            async for _ in pushed:
                pass
            return web.json_response(reply.whole(choices))
        finally:  # also runs where the client disconnects, which cancels this handler
            self.worker.release(jobs)
            self.answering.discard(events)
            if not self.answering:
                self.idle.set()

    def _put(self, request, events, index, streamed, event):
        """Keeps an event of text `index` until its request's handler takes it. A stream that is too far behind is cut off."""
        events.put_nowait((index, event))
        if streamed and events.qsize() > BEHIND and request.transport is not None:
            request.transport.abort()

    def _client(self, request):
        """Returns whom a request counts for where slots are shared: its API key, or without keys its address."""
        return request.headers.get("Authorization", "") if self.settings.keys else request.remote

    async def _asked(self, request, kind):
        if request.content_type != "application/json":  # a browser asks before it sends this type to another site
            raise Refused("Content-Type must be application/json", status=415)
        try:
            data = await asyncio.wait_for(request.read(), BODY_S)
            data = _unpacked(data, request.headers.get("Content-Encoding", "identity").strip().lower(), self.settings.max_body)
        except asyncio.TimeoutError as late:
            raise Refused(f"the body did not arrive within {BODY_S} s", status=408) from late
        except (web.RequestPayloadError, ValueError, zlib.error) as wrong:  # such as plain text with Content-Encoding: gzip
            raise Refused("the body does not have the Content-Encoding or Transfer-Encoding that its headers name") from wrong
        s = self.settings
        given = s.tokenizer, s.model, s.length, s.stop_ids, self.worker.most, s.defaults, s.forms, s.compiler, s.adapters
        return await self._in_turn(request, kind, data, kind, *given)

    async def _in_turn(self, request, kind, *arguments):
        """Returns parse(*arguments), run in a thread. A client has one thread of a kind at a time, also for requests that it has dropped:
        so its templates without an end, or its huge prompts, do not keep others waiting."""
        turn = self.turns.setdefault((self._client(request), kind), asyncio.Lock())
        await turn.acquire()
        parsed = asyncio.get_running_loop().run_in_executor(self.parsers[kind], parse, *arguments)

        def end(parsed):
            turn.release()
            parsed.cancelled() or parsed.exception()  # looked at here, as the client may have gone

        parsed.add_done_callback(end)
        return await asyncio.shield(parsed)

    async def _pushed(self, jobs, choices, events, timer):
        """Yields (index, new pieces, logprobs entries) as choices grow, until all have ended. Raises Refused where the engine raised."""
        while any(choice.reason is None for choice in choices):
            index, found = await events.get()
            if isinstance(found, ValueError):
                raise Refused(str(found)) from found
            if isinstance(found, Exception):
                raise Refused("the engine failed; try again", status=500, code="internal_error") from found
            if found.finish_reason == "error":
                words = "the model's logits for this text are NaN or infinite, so it has no next token"
                raise Refused(words, status=500, code="not_finite")
            if found.finish_reason == "guide":
                words = "the grammar of this text has grown too large to go on, or has no next token; make the schema simpler"
                raise Refused(words, status=500, code="grammar_failed")
            if choices[index].reason is None:
                new = choices[index].push(found)
                timer.token(index, choices[index].reason)
                yield index, *new
                if choices[index].reason:
                    self.worker.release([jobs[index]])  # the engine does not know stop strings and would go on
        timer.end()

    async def _streamed(self, request, choices, pushed, reply):
        response = Stream(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)

        async def write(data):
            """A client that does not read fills its buffer, and would keep its slot for ever."""
            try:
                await asyncio.wait_for(response.write(data), self.idle_s)
            except asyncio.TimeoutError:
                request.transport.abort()
                raise ConnectionError("the client does not read") from None

        try:
            for index in range(len(choices)):
                if opening := reply.opening(index):
                    await write(event(opening))
            async for index, pieces, entries in pushed:
                if pieces or entries or choices[index].reason:
                    for chunk in reply.chunks(index, choices[index], pieces, entries):
                        await write(event(chunk))
            if reply.asked.include_usage:
                await write(event(reply.last(choices)))
            await write(b"data: [DONE]\n\n")
        except Refused as refused:
            await write(event(error(str(refused), refused.param, refused.code, refused.status)))
        except ConnectionError:
            response.broken = True
        return response


def _unpacked(data, encoding, most):
    """Returns the body in a Content-Encoding. Of a body that unpacks to more than `most` bytes, no more than that is unpacked: aiohttp
    would unpack all that has arrived, for 0.2 s in which nothing else is answered. Raises zlib.error, ValueError for a body that breaks
    off, and the errors of what is not supported."""
    if encoding == "identity":
        return data
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Refused(f"Content-Encoding: {short(encoding)} is not supported; use gzip, or none", status=415)
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS if encoding == "deflate" else zlib.MAX_WBITS | 16)
    found = unpacker.decompress(data, most + 1)
    if len(found) > most:
        raise web.HTTPRequestEntityTooLarge(most, len(found))
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("the body breaks off, or goes on after its end")
    return found


class _Protocol(web.RequestHandler):
    """aiohttp's side of one connection. Its answers to what is no HTTP request are OpenAI's JSON too, and are not logged: anyone can send
    such bytes, as often as they like."""

    def handle_error(self, request, status=500, exc=None, message=None):
        if status >= 500 and exc is not None:
            report(exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        words = (
            "the server failed; see its log"
            if status >= 500
            else f"this is no HTTP request that the server can read: {HTTPStatus(status).phrase}"
        )
        response = web.json_response(error(words, code="internal_error" if status >= 500 else "bad_http", status=status), status=status)
        response.force_close()
        return response

    def log_exception(self, *args, exc_info=None, **options):
        """Reports an error inside the server. A body that breaks off, or is not in its encoding, is the client's error."""
        if isinstance(exc_info, Exception) and not isinstance(exc_info, web.RequestPayloadError):
            report(exc_info)


async def expected(request):
    """Answers the header Expect: with 100 Continue, or with an error for anything else."""
    if request.headers["Expect"].lower() != "100-continue":
        return web.json_response(error("the only Expect that is known is 100-continue", code="bad_http", status=417), status=417)
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer has not begun


class Connect:
    """Makes the protocol of a new connection, and lists the open connections. manager: aiohttp's web.Server."""

    def __init__(self, manager):
        self.manager = manager

    def __call__(self):
        return _Protocol(self.manager, loop=asyncio.get_running_loop(), **self.manager._kwargs)

    @property
    def connections(self):
        return self.manager.connections


class Gate:
    """Accepts connections, as many as server.most_connections at a time; further ones wait until one closes. Connections without a request
    at work for server.idle_s seconds are closed: idle ones, and those whose request's head does not arrive.

    connect: a Connect.
    """

    def __init__(self, connect, server):
        self.connect, self.server, self.full = connect, server, False

    async def accept(self, sock):
        loop = asyncio.get_running_loop()
        while True:
            while len(self.connect.connections) >= self.server.most_connections:
                self._tell(f"all {self.server.most_connections} connections are in use")
                await asyncio.sleep(LOOK_S)
            try:
                new, _ = await loop.sock_accept(sock)
            except OSError as error:  # the process or the system is at its limit of open files, or the client has gone
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._tell(f"no connection can be accepted ({error.strerror})")
                await asyncio.sleep(RETRY_S)
                continue
            self.full = False
            try:
                transport, _ = await loop.connect_accepted_socket(self.connect, new)
            except OSError:  # the client has gone
                new.close()
            else:
                self.server.last[transport] = loop.time()

    def _tell(self, what):
        """Says it once, until a connection is accepted again."""
        if not self.full:
            print(f"full       {what}; new ones wait until one closes", flush=True)
        self.full = True

    async def close_idle(self):
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, self.server.idle_s / 4))
            now = loop.time()
            for transport, since in list(self.server.last.items()):
                if transport not in self.server.working and now - since > self.server.idle_s:
                    transport.abort()


async def serve(server, sockets, ready, stop, drain_s):
    """Listens on bound sockets until `stop`, an asyncio.Event, is set; then waits up to drain_s seconds for server.idle, and closes.

    ready(port) is called once the server listens. Raises OSError where it cannot listen.
    """
    options = {"access_log": None, "handler_cancellation": True, "shutdown_timeout": 1, "keepalive_timeout": server.idle_s}
    runner = web.AppRunner(server.app(), **options, auto_decompress=False)  # see _unpacked
    await runner.setup()
    tasks = []
    try:
        for sock in sockets:
            sock.listen(BACKLOG)
        gate = Gate(Connect(runner.server), server)
        tasks += [asyncio.create_task(gate.accept(sock)) for sock in sockets]
        tasks.append(asyncio.create_task(gate.close_idle()))
        ready(sockets[0].getsockname()[1])
        await stop.wait()
        server.draining = True
        try:
            await asyncio.wait_for(server.idle.wait(), drain_s)
        except asyncio.TimeoutError:
            print(f"stopping   requests that still run after {drain_s:g} s are dropped", flush=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in sockets:
            sock.close()
        await runner.cleanup()
        for pool in server.parsers.values():
            pool.shutdown(wait=False, cancel_futures=True)
        template.end()  # the process would wait for a thread that waits for a template
