"""A link between a device and its SuperLink that can be cut and mended."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Link:
    """Hands bytes on between whoever connects to ``port`` and a port of this machine, while it is whole."""

    def __init__(self, target_port: int) -> None:
        self.target_port, self.is_whole = target_port, True
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections, and those to come at once."""
        self.is_whole = False
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Hand on again."""
        self.is_whole = True

    def close(self) -> None:
        """Be gone."""
        self.cut()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return  # closed
            try:
                far = socket.create_connection(("127.0.0.1", self.target_port), timeout=5) if self.is_whole else None
            except OSError:
                far = None
            if far is None:
                near.close()
                continue
            far.settimeout(None)
            for source, sink in ((near, far), (far, near)):
                self._open.add(source)
                threading.Thread(target=self._hand_on, args=(source, sink), daemon=True).start()

    def _hand_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while self.is_whole and (data := source.recv(2**16)):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()
