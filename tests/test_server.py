"""``serve`` from loading to its end, without a connection: what it holds, what it lets go, what it closes."""

import asyncio
import gc
import signal
import weakref

import httpx
import pytest
import uvicorn
from fake_endpoint import fake_remote
from test_scheduler import make_proxy, make_version, until
from test_versions import make_run
from tiny import tiny_llama
from uvicorn.server import ServerState

from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.runs import replace_link, write_json
from fedpt_flwr.service import server as server_module
from fedpt_flwr.service.app import create_app
from fedpt_flwr.service.guard import Service, ServiceConfig
from fedpt_flwr.service.metrics import Metrics
from fedpt_flwr.service.scheduler import Limits, Scheduler
from fedpt_flwr.service.server import ServerConfig, serve
from fedpt_flwr.service.versions import Loader


@pytest.fixture
def serve_while(monkeypatch):
    """A function that serves a run while another one, given what requests share, runs in place of uvicorn."""

    def go(run, during, *, loader=None, on_ready=lambda _version, _address: None, **settings):
        made = {}

        def create_app(shared, *, on_start):
            made.update(shared=shared, on_start=on_start)

        def run_server(_server, *, sockets):
            loop = asyncio.new_event_loop()
            made["on_start"](loop)
            try:
                during(made["shared"])
            finally:
                loop.close()

        monkeypatch.setattr(server_module, "create_app", create_app)
        monkeypatch.setattr(server_module._Server, "run", run_server)
        monkeypatch.setattr(server_module, "set_up_logging", lambda: None)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            serve(
                run,
                loader or Loader(),
                ServerConfig(port=0, poll_s=0.01, num_threads=1, **settings),
                ServiceConfig(),
                Limits(draft_tokens=2),
                on_ready=on_ready,
            )
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return go


def test_the_connection_to_a_remote_model_is_closed_at_the_end(tmp_path, serve_while):
    large = fake_remote()
    serve_while(make_run(tmp_path), lambda _shared: None, loader=Loader(large=large))
    assert large.endpoint._is_closed


def test_the_first_version_is_freed_once_another_one_is_served(tmp_path, serve_while):
    run, first, told = make_run(tmp_path, rounds=2), [], []

    def during(shared):
        replace_link(run / "proxy", "rounds/0002/proxy")
        until(lambda: shared.scheduler.version.server_round == 2)

        def is_gone():
            gc.collect()
            return all(part() is None for part in first)

        until(is_gone)

    def on_ready(version, _address):
        first.extend([weakref.ref(version), weakref.ref(version.proxy.tuned)])
        told.append(version.server_round)

    serve_while(run, during, on_ready=on_ready)
    assert told == [1]


def test_what_a_remote_model_costs_is_shown_of_the_version_that_is_served():
    remote, here = (ProxyModel(large, tiny_llama(2), tiny_llama(3)) for large in (fake_remote(), tiny_llama(1)))
    metrics, large = Metrics(), weakref.ref(remote.large)
    metrics.set_version(make_version(remote))
    remote.large.endpoint.usage.requests = 7
    assert b'fedpt_remote{quantity="requests"} 7.0' in metrics.render()
    del remote
    metrics.set_version(make_version(here))
    gc.collect()
    assert large() is None
    assert b"fedpt_remote{" not in metrics.render()


def info_of(version, **config):
    """What a service for a version says at ``/info``."""
    scheduler = Scheduler(version, Limits(), Metrics(), lambda _events: None)
    shared = Service(scheduler=scheduler, metrics=Metrics(), config=ServiceConfig(**config))
    app = create_app(shared, on_start=lambda _loop: None)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
            return (await http.get("/info")).json()

    return asyncio.run(ask())


def test_scores_are_shown_as_soon_as_the_run_has_them(tmp_path):
    run = make_run(tmp_path)
    version = Loader().load(run)
    assert info_of(version)["scores"] is None
    row = {"exact_match": 0.5, "loss": 1.25}
    write_json(run / "results.json", {"rows": {"proxy": row | {"n": 3}, "few_shot": row}})
    assert info_of(version)["scores"] == {"proxy": row}


@pytest.mark.parametrize(("limit", "shown"), [(5, 5), (4096, 16)])
def test_no_longer_answer_is_proposed_than_may_be_asked_for(limit, shown):
    assert info_of(make_version(make_proxy()), max_new_tokens=limit)["max_tokens"] == shown


# --- connections --------------------------------------------------------------------------------------------------


class Transport(asyncio.Transport):
    """The server's end of a connection: remembers what is written, and whether it is closed."""

    def __init__(self):
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written, self.is_open = b"", True

    def write(self, data):
        self.written += data

    def is_closing(self):
        return not self.is_open

    def close(self):
        self.is_open = False

    def set_protocol(self, protocol):
        pass

    pause_reading = resume_reading = lambda _self: None


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


WHOLE = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


@pytest.mark.parametrize("before", [0, 1, 2], ids=["first", "second", "third"])
@pytest.mark.parametrize(
    ("pieces", "stays"),
    [([b"GET / HT"], False), ([b"GET", b" / ", b"HTTP"], False), ([WHOLE[:9], WHOLE[9:]], True)],
    ids=["part", "piece by piece", "whole"],
)
def test_a_connection_that_begins_a_request_and_does_not_end_it_is_closed(before, pieces, stays):
    async def connect():
        loop, timers = asyncio.get_running_loop(), []

        def call_later(delay, call, *args):
            timer = asyncio.TimerHandle(0, call, args, loop)
            timers.append((delay, timer))
            return timer

        loop.call_later = call_later  # time passes when the test says so
        config = uvicorn.Config(hello, log_config=None, http=server_module._Protocol, ws="none")
        config.load()
        protocol, transport = server_module._Protocol(config, ServerState(), {}, loop), Transport()
        protocol.connection_made(transport)

        async def answered(number):
            while transport.written.count(b"200 OK") < number or not protocol.cycle.response_complete:
                await asyncio.sleep(0)

        for number in range(before):
            protocol.data_received(WHOLE)
            await answered(number + 1)
        for piece in pieces:
            protocol.data_received(piece)
        watching = [timer for delay, timer in timers if delay == 30.0 and not timer.cancelled()]
        assert len(watching) == (not stays)  # however many pieces: each would give more time
        if stays:
            await answered(before + 1)
        for timer in watching:
            timer._run()
        assert transport.is_open == stays
        protocol.connection_lost(None)

    asyncio.run(connect())
