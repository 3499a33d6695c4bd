# SPDX-License-Identifier: Apache-2.0
"""The way to the coordinator as Flower's client and gRPC's take it: straight, or through the hospital's proxy.

The proxy is that of ``HTTPS_PROXY`` (CONNECT, RFC 9110 §9.3.6, with the user and password in its URL), unless
``NO_PROXY`` names the coordinator.
"""

import base64
import socket
import urllib.request
from urllib.parse import unquote, urlsplit

__all__ = ["Way", "head_of_answer"]

PATIENCE = 10.0


class Way:
    """The way to one address.

    Args:
        address: ``host:port``.
        proxy: URL of an HTTP proxy; empty: none; None: as the environment says.
    """

    def __init__(self, address: str, proxy: str | None = None) -> None:
        host, _, port = address.rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
        if proxy is None:
            bypass = bool(urllib.request.proxy_bypass(f"{self.host}:{self.port}"))
            proxy = "" if bypass else urllib.request.getproxies().get("https", "")
        self.proxy = urlsplit(proxy if "//" in proxy or not proxy else f"http://{proxy}")

    @property
    def first_hop(self) -> tuple[str, int]:
        """Whom this machine talks to: the proxy, or the coordinator."""
        if self.proxy.hostname:
            return self.proxy.hostname, self.proxy.port or 3128
        return self.host, self.port

    def connect(self) -> socket.socket:
        """A connection to the coordinator's port, through the proxy if there is one.

        Raises:
            OSError: it cannot be reached, or the proxy says no.
        """
        connection = socket.create_connection(self.first_hop, timeout=PATIENCE)
        if self.proxy.hostname:
            try:
                self._ask_proxy(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    def _ask_proxy(self, connection: socket.socket) -> None:
        target = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.proxy.username:
            pair = f"{unquote(self.proxy.username)}:{unquote(self.proxy.password or '')}"
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}")
        connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        answer = head_of_answer(connection).split("\r\n")[0]
        status = answer.split(" ")[1] if answer.count(" ") >= 1 else ""
        if status != "200":
            meaning = {
                "407": "it asks for a user and password: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT",
                "403": "it forbids this host and port: ask for the row of fedneuro-node doctor --ports",
            }
            raise OSError(f"the proxy answers {answer[:80]!r}; {meaning.get(status, 'ask who runs it')}")


def head_of_answer(connection: socket.socket) -> str:
    """The head of an HTTP answer, as far as it came."""
    found = b""
    while b"\r\n\r\n" not in found and len(found) < 65536:
        part = connection.recv(4096)
        if not part:
            break
        found += part
    return found.partition(b"\r\n\r\n")[0].decode("latin-1")
