"""Server process: serving of the application until a signal, then graceful shutdown."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import anyio
import typer
import uvicorn
from fastapi import FastAPI

from mteditflow._checks import check_number
from mteditflow.rewards.server import batching, service
from mteditflow.rewards.server.guarding import (
    BACKLOG,
    LoopbackHosts,
    RateLimit,
    bounded,
    is_loopback,
    most_connections,
)
from mteditflow.rewards.server.service import Service

LOG = logging.getLogger(__name__)
# Loggers whose number of lines depends on the clients, hence the rate limit.
LOUD = ("asyncio", "uvicorn.error", service.LOG.name, batching.LOG.name)
KEEP_ALIVE = 75  # s for which an idle connection stays open for its client's next request
CLOSING = 1  # s for connections to close after their requests are finished


def serve(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    grace: float = 30.0,
    access_log: bool = False,
) -> int:
    """Serve an application of ``create_app`` until SIGTERM or Ctrl-C.

    The URL is written to standard output as soon as the server listens. After a signal the server
    refuses new requests (503) and finishes those in progress; a second signal ends that wait.
    Requests that are not finished within ``grace`` get 503 as well.

    The number of connections is bounded by the limit of open files, the time for a header by 20 s,
    and repeated lines of the log by 20 a minute. Without a token, only requests addressed to
    localhost or a loopback address are answered; others get 421.

    Args:
        app: the application.
        host: address to listen on; one that other machines can reach requires a token.
        port: port to listen on; 0 for any free one.
        grace: longest time to finish requests in progress, s.
        access_log: whether to log every request.

    Returns:
        Exit status: 0 if all requests were answered, 1 if some were cut off or loading failed. If
        the models are still running after ``grace``, the process ends instead.

    Raises:
        ValueError: the address is not a loopback address and there is no token; the limit of open
            files leaves no connection; or ``grace`` is out of range.
        OSError: listening on the address failed, for instance because the port is in use.
    """
    check_number("grace", grace, low=0.0)
    service: Service = app.state.service
    check_host(host, secured=app.state.secured)
    most = most_connections()
    listener = listen(host, port)
    config = uvicorn.Config(
        app if app.state.secured else LoopbackHosts(app),
        http="h11",
        ws="none",  # an upgraded connection would leave the bounds
        backlog=BACKLOG,
        log_config=None,
        access_log=access_log,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=CLOSING,
    )
    config.load()
    config.http_protocol_class = bounded(config.http_protocol_class, most)
    limit = RateLimit()
    for name in LOUD:
        logging.getLogger(name).addFilter(limit)
    server = _Server(config, service, grace)
    try:
        server.run(sockets=[listener])
    finally:
        for name in LOUD:
            logging.getLogger(name).removeFilter(limit)
    status = int(server.cut_off or service.broken)
    if service.working:  # their thread cannot be stopped, and Python would wait for it at exit
        LOG.warning("the models were still running")
        logging.shutdown()
        os._exit(status)
    return status


def check_host(host: str, *, secured: bool) -> None:
    """Check that only this machine can reach an address, unless a token is required.

    Raises:
        ValueError: other machines can reach the address, and there is no token.

    Example:
        >>> check_host("0.0.0.0", secured=False)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: host: expected the loopback, or a token, as other machines can reach 0...
    """
    loopback = is_loopback(host)
    if not loopback and not secured:
        raise ValueError(
            f"host: expected the loopback, or a token, as other machines can reach {host}; give "
            "one by MTEDITFLOW_TOKEN or --token-file"
        )
    if not loopback:
        LOG.warning("other machines can reach %s, and HTTP hides neither token nor images", host)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        OSError: listening failed; the message has the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"{host}:{port}: cannot be listened on: {error.strerror or error}") from error


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace
        self.cut_off = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit  # set by the second signal only
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        typer.echo(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}/v1")

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.broken

    async def main_loop(self) -> None:
        """Serve until a signal; the sockets close only after this."""
        await super().main_loop()
        self._service.stop()
        LOG.info("stopping: refusing new requests, finishing those in progress")
        with anyio.move_on_after(self._grace):
            while self._service.busy and not self.force_exit:
                await anyio.sleep(0.05)
        self.cut_off = self._service.busy
        self._service.cut_off()
