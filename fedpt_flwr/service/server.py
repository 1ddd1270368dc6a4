"""``fedpt serve``: load a run, watch it, answer over HTTP until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fedpt_flwr.errors import ConfigError, RunError
from fedpt_flwr.remote import RemoteModel
from fedpt_flwr.service.app import create_app
from fedpt_flwr.service.guard import Service, ServiceConfig
from fedpt_flwr.service.logs import log_event, set_up_logging
from fedpt_flwr.service.metrics import Metrics
from fedpt_flwr.service.scheduler import Delivery, Limits, Scheduler
from fedpt_flwr.service.versions import Loader, Version, Watcher

_STALLED_MS = 60_000
"""How long a client may leave what it was sent unread, or be silent where it should confirm, until it is given up."""
_HEADERS_TIMEOUT_S = 30.0
"""Until a connection has sent the headers of a request that it has begun, or of its first."""
_FAREWELL_S = 5
"""Time after the grace period in which the last answers still go out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where and how the service listens."""

    host: str = "127.0.0.1"
    port: int = 8080
    grace_s: float = 30.0
    """Time for running requests once the service has been told to stop."""
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_keyfile_password: str | None = None
    follow: bool = False
    poll_s: float = 1.0
    num_threads: int | None = None


def serve(
    run: Path,
    loader: Loader,
    server: ServerConfig,
    service: ServiceConfig,
    limits: Limits,
    *,
    on_ready: Callable[[Version, str], None],
) -> None:
    """Serve a run until SIGTERM or SIGINT.

    Args:
        run: Folder of the run.
        loader: Loads its versions.
        server: Where and how to listen.
        service: What the operator decides about requests.
        limits: What is taken on at once.
        on_ready: Called with the version and the address once requests are answered.

    Raises:
        RunError: The run has nothing to serve, or the port is taken.
        ModelError: A model cannot be loaded.
    """
    listening = _listen(server)  # first, since loading may take long and a taken port should not
    scheme = "https" if server.ssl_certfile else "http"
    host, port = listening.getsockname()[:2]
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    with contextlib.closing(listening):
        version = loader.load(run)
        metrics = Metrics()
        metrics.slots.set(limits.num_slots)
        metrics.set_version(version)
        loop: asyncio.AbstractEventLoop | None = None

        def deliver(events: Delivery) -> None:
            if loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                    loop.call_soon_threadsafe(_dispatch, events)

        scheduler = Scheduler(version, limits, metrics, deliver, num_threads=server.num_threads)
        shared = Service(scheduler=scheduler, metrics=metrics, config=service)

        def on_version(new: Version) -> None:
            scheduler.swap(new)
            metrics.swaps.labels("ok").inc()
            log_event("new version", version=new.name)

        def on_failure(reason: str) -> None:
            metrics.swaps.labels("failed").inc()
            log_event("a new version could not be loaded; the old one is served", warning=True, reason=reason)

        watcher = Watcher(
            loader,
            run,
            served=version.mark,
            follow=server.follow,
            poll_s=server.poll_s,
            on_version=on_version,
            on_failure=on_failure,
        )

        def on_start(running: asyncio.AbstractEventLoop) -> None:
            nonlocal loop
            loop = running
            scheduler.start()
            watcher.start()
            on_ready(scheduler.version, address)

        del version  # or the first one would stay in memory, whatever is served later
        set_up_logging()
        app = create_app(shared, on_start=on_start)
        http = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=round(server.grace_s) + _FAREWELL_S,
                ssl_certfile=str(server.ssl_certfile) if server.ssl_certfile else None,
                ssl_keyfile=str(server.ssl_keyfile) if server.ssl_keyfile else None,
                ssl_keyfile_password=server.ssl_keyfile_password,
            ),
            on_exit=partial(_begin_stop, shared, server.grace_s),
        )
        # uvicorn raises the signal again when it has stopped in peace; that is no reason to die of it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        http.run(sockets=[listening])
        watcher.stop()
        scheduler.stop(0)
        if isinstance(large := scheduler.version.proxy.large, RemoteModel):
            large.endpoint.close()  # or the process would wait for requests that are sent again and again
        scheduler.join(_FAREWELL_S)
        log_event("stopped")


def _begin_stop(service: Service, grace_s: float) -> None:
    if not service.stopping:
        service.stopping = True
        service.scheduler.stop(grace_s)


def _dispatch(events: Delivery) -> None:
    for sink, event in events:
        sink(event)


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes connections that begin a request and never say all that they want; uvicorn watches only idle ones."""

    _headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Begin to wait for a whole request, unless one has come, or is waited for: more pieces give no more time."""
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing."""
        super().connection_lost(exc)
        self._forget_headers()

    def _watch_headers(self) -> None:
        if self._is_answering():
            self._forget_headers()
        elif self._headers_timer is None:
            self._headers_timer = self.loop.call_later(_HEADERS_TIMEOUT_S, self._close_if_silent)

    def _forget_headers(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_if_silent(self) -> None:
        self._headers_timer = None
        if not self._is_answering() and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Says at once when it is told to stop; uvicorn itself first waits for the open requests."""

    def __init__(self, config: uvicorn.Config, *, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second Ctrl-C does not wait."""
        self._on_exit()
        super().handle_exit(sig, frame)


def _listen(server: ServerConfig) -> socket.socket:
    """A listening socket, so that a port that is taken is said in our words."""
    if server.ssl_keyfile and not server.ssl_certfile:
        raise ConfigError("a TLS key needs its certificate", place="--ssl-keyfile", remedy="add --ssl-certfile")
    for option, path in (("--ssl-certfile", server.ssl_certfile), ("--ssl-keyfile", server.ssl_keyfile)):
        if path is not None and not path.is_file():
            raise ConfigError("must be a file that exists", value=str(path), place=option)
    if server.ssl_certfile is not None:
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile, server.ssl_keyfile_password or "")
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"cannot be used ({error})",
                value=str(server.ssl_certfile),
                place="--ssl-certfile and --ssl-keyfile",
                remedy="give a certificate and its private key in PEM form"
                if server.ssl_keyfile
                else "add --ssl-keyfile, unless the file holds the private key as well",
            ) from error
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"is no address of this machine ({error.strerror or error})", value=server.host, place="--host"
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit these: one whose other end is gone, or never reads, is closed by the system.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise RunError(
            f"cannot listen at {server.host}:{server.port} ({error.strerror})",
            remedy="choose another --port, or end the service that is there",
        ) from error
    return listening
