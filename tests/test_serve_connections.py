"""Connections and bodies that would keep others out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from fastapi import FastAPI, Request  # noqa: E402

from fluxfire.serve.connections import ConnectionGuard, most_connections  # noqa: E402
from fluxfire.serve.max_body_size import MaxBodySizeMiddleware  # noqa: E402
from fluxfire.serve.problems import add_handlers  # noqa: E402
from fluxfire.serve.server import Server, bind_socket  # noqa: E402
from fluxfire.serve.settings import Settings  # noqa: E402

PATIENCE = 600


class Connection:
    """As uvicorn's protocol: it has no request, is answering one, or has answered one."""

    def __init__(self, answered=None):
        self.cycle = None if answered is None else SimpleNamespace(response_complete=answered)
        self.aborted = False
        self.transport = SimpleNamespace(abort=self.abort)

    def abort(self):
        self.aborted = True


def test_connections_without_a_request_end_after_their_time():
    silent, answering, done = Connection(), Connection(False), Connection(True)
    guard = ConnectionGuard({silent, answering, done}, 20, 100)
    assert [guard.look(now) for now in (100, 110, 119.9)] == [0, 0, 0]
    done.cycle = SimpleNamespace(response_complete=False)  # its next request
    assert guard.look(119.95) == 0
    done.cycle = SimpleNamespace(response_complete=True)
    assert guard.look(120) == 1
    assert silent.aborted
    assert not done.aborted  # its time began anew
    assert guard.look(1000) == 1
    assert done.aborted
    assert not answering.aborted


def test_where_there_are_many_the_oldest_silent_ones_make_room():
    answering = [Connection(False) for _ in range(6)]
    connections = set(answering)
    guard = ConnectionGuard(connections, 20, 8)
    old = [Connection() for _ in range(2)]
    connections.update(old)
    assert guard.look(0) == 0
    new = [Connection() for _ in range(3)]
    connections.update(new)
    assert guard.look(1) == 3
    assert all(each.aborted for each in old)
    assert sum(each.aborted for each in new) == 1
    assert not any(each.aborted for each in answering)


def test_it_holds_at_most_half_of_the_descriptors():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert most_connections() == 128
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Engine:
    """Has nothing to finish."""

    async def drain(self, seconds):
        pass


@contextlib.contextmanager
def serving(app, **settings):
    """The server itself, with an application of the test's own; yields its address."""
    app.state.settings, app.state.engine = Settings(port=0, **settings), Engine()
    listener = bind_socket(app.state.settings)
    server = Server(app, 1.0)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def test_half_a_head_is_not_waited_for_but_a_slow_answer_is():
    app = FastAPI()

    @app.get("/slow")
    async def slow():
        await asyncio.sleep(4)
        return "done"

    with serving(app, head_seconds=1) as address:
        lines = [socket.create_connection(address, timeout=PATIENCE) for _ in range(3)]
        lines[1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-a: ")
        lines[2].sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        heard = b""
        while not heard.endswith(b"}"):
            heard += lines[2].recv(65536)
        lines[2].sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-a: ")
        url = f"http://{address[0]}:{address[1]}/slow"
        assert httpx.get(url, timeout=PATIENCE).json() == "done"
        for line in lines:
            with contextlib.suppress(ConnectionError), line:
                while line.recv(65536):  # until the server closes it
                    pass


def test_bodies_that_arrive_share_a_limit():
    app, read = FastAPI(), []

    @app.post("/")
    async def post(request: Request):
        read.append(len(await request.body()))

    app.add_middleware(MaxBodySizeMiddleware, most=1000)
    add_handlers(app)

    async def send(parts):
        """Send a body's parts, each once the test gives it; return the status of the answer."""
        statuses = []

        async def receive():
            part = await parts.get()
            return {"type": "http.request", "body": part or b"", "more_body": part is not None}

        async def sent(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"transfer-encoding", b"chunked")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": headers,
        }
        await app(scope, receive, sent)
        return statuses[0]

    async def story():
        app.state.engine = SimpleNamespace(retry_after=lambda: 1)
        queues = [asyncio.Queue() for _ in range(6)]
        sends = [asyncio.create_task(send(queue)) for queue in queues]
        for queue in queues[:4]:
            queue.put_nowait(b"x" * 1000)  # as much as all of them may have
        for _ in range(100):  # until they are read
            await asyncio.sleep(0)
        queues[4].put_nowait(b"x")
        assert await sends[4] == 429
        queues[0].put_nowait(b"x")
        assert await sends[0] == 413
        queues[5].put_nowait(b"x" * 500)  # there is room again
        for queue in queues:
            queue.put_nowait(None)
        assert [await each for each in sends] == [413, 200, 200, 200, 429, 200]
        assert sorted(read) == [500, 1000, 1000, 1000]

    asyncio.run(story())
