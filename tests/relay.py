"""A relay between a device and the SuperLink that reads along, and that can cut the wire.

It ends TLS with the SuperLink's own certificate and begins it anew, so everything that the device sends passes here in
the clear: bodies, headers, all of it.
"""

import asyncio
import contextlib
import ssl
import threading
from pathlib import Path


class Relay:
    """One device's way to a SuperLink on this machine.

    Args:
        certs: Folder made by `fedpt certs`.
        target_port: The SuperLink's.

    Attributes:
        port: Where the device connects to.
        sent: What it has sent, one entry for each connection.
    """

    def __init__(self, certs: Path, target_port: int) -> None:
        self.sent: list[bytearray] = []
        self._target_port = target_port
        self._server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server_tls.load_cert_chain(certs / "server.pem", certs / "server.key")
        self._client_tls = ssl.create_default_context(cafile=str(certs / "ca.crt"))
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._wait(asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._server_tls))
        self.port = self._server.sockets[0].getsockname()[1]

    def text(self) -> bytes:
        """Everything that the device has sent."""
        return b"\n".join(bytes(part) for part in self.sent)

    def cut(self) -> None:
        """Cut the wire: what is open breaks, what comes is refused."""

        async def cut() -> None:
            self._is_cut = True
            for writer in list(self._writers):
                writer.transport.abort()

        self._wait(cut())

    def mend(self) -> None:
        """Let the device through again."""
        self._is_cut = False

    def stop(self) -> None:
        """Close everything."""
        self.cut()

        async def close() -> None:
            self._server.close()
            await asyncio.sleep(0.1)  # lets the connections' tasks end

        self._wait(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = bytearray()
        self.sent.append(sent)
        if self._is_cut:
            writer.transport.abort()
            return
        onward = None
        self._writers.add(writer)
        try:
            back, onward = await asyncio.open_connection(
                "127.0.0.1", self._target_port, ssl=self._client_tls, server_hostname="localhost"
            )
            self._writers.add(onward)
            await asyncio.gather(_pump(reader, onward, sent), _pump(back, writer, None))
        except OSError:  # the SuperLink is away, or the wire was cut
            pass
        finally:
            for end in (writer, onward):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray | None) -> None:
    while data := await reader.read(1 << 16):
        if record is not None:
            record += data
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.close()
