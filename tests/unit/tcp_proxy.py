"""A network between a client and a server on one machine, which can fall silent: no byte passes any more, in either
direction, and no connection is closed. That is how a half-open socket looks from its ends."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import suppress


class TcpProxy:
    """Passes connections to `port` of this machine on to another of its own, `self.port`. What waits while `silent`
    passes afterwards, new connections too."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open, self._closing = threading.Event(), False
        self._open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> float:
        """When it did, `time.monotonic()`: what is passed on after that began before it."""
        self._open.clear()
        return time.monotonic()

    def speak(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._closing = True
        self._open.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._pass, args=(near,), daemon=True).start()

    def _pass(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            self._open.wait()
            with socket.create_connection(("127.0.0.1", self._target)) as far:
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while not self._closing:
                    for end in select.select([near, far], [], [], 0.2)[0]:
                        self._open.wait()
                        data = end.recv(1 << 16)
                        if not data:
                            return
                        (far if end is near else near).sendall(data)


__all__ = ["TcpProxy"]
