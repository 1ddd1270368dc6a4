"""``serve`` from loading to its end, without a connection: what it holds, what it lets go, what it closes."""

import asyncio
import signal

import pytest
from fake_endpoint import fake_remote
from test_versions import make_run

from fedpt_flwr.service import server as server_module
from fedpt_flwr.service.guard import ServiceConfig
from fedpt_flwr.service.scheduler import Limits
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
