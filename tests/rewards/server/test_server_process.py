"""The consistency server as its users start it: in a process of its own, on a socket."""

import socket
import threading
from functools import partial
from urllib.parse import urlsplit

import httpx2
import pytest
from consistency_world import (
    ServerProcess,
    color_scorer,
    color_server,
    models_server,
    pair,
    picture,
    request_of,
    scores_of,
)

from mteditflow.rewards import ConsistencyScorer

TOKEN = "a-secret-token"
IMAGES = [picture(n) for n in range(3)]
GOOD = request_of(IMAGES[:2], [pair()])
HALF_A_REQUEST = (
    b"POST /v1/consistency HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000\r\n\r\n{"
)


def post(server, answers):
    """Send a request; append what came of it."""
    try:
        answers.append(httpx2.post(f"{server.url}/consistency", json=GOOD, timeout=60))
    except httpx2.TransportError as error:
        answers.append(error)


@pytest.mark.slow
def test_the_server_of_real_models_starts_with_a_token_scores_and_stops(
    tiny_models, detector, features, tmp_path
):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    names = {"unchanged_objects": ("cat",), "all_objects": ("cat", "dog")}
    pairs = [pair(0, n, **names) for n in (1, 2)]
    body = request_of(IMAGES, pairs)
    with ServerProcess(models_server(tiny_models, "--token-file", str(file))) as server:
        ask = partial(httpx2.post, f"{server.url}/consistency", json=body, timeout=60)
        assert ask().status_code == 401
        assert ask(headers={"Authorization": "Bearer wrong-token"}).status_code == 401
        answer = ask(headers={"Authorization": f"Bearer {TOKEN}"})
        found = scores_of(answer.json())
        assert found == ConsistencyScorer(detector, features).score_pairs(IMAGES, pairs)
        assert "server" not in answer.headers
        server.terminate()
        assert server.exit_status() == 0
    log = "".join(server.log)
    assert "ready: models loaded" in log
    assert TOKEN not in log
    assert "wrong-token" not in log


def test_requests_that_are_here_are_finished_when_told_to_stop():
    with ServerProcess(color_server(1.0)) as server:
        answers = []
        first = threading.Thread(target=post, args=(server, answers))
        first.start()
        server.until_logged("looking")
        server.terminate()
        server.until("stopping")
        refused = httpx2.post(f"{server.url}/consistency", json=GOOD, timeout=60)
        assert refused.status_code == 503
        assert refused.json() == {"detail": "the server is stopping"}
        first.join()
        assert answers[0].status_code == 200
        assert scores_of(answers[0].json()) == color_scorer().score_pairs(IMAGES[:2], [pair()])
        assert server.exit_status() == 0


def test_a_client_learns_why_its_body_is_refused_although_it_still_sends():
    with ServerProcess(color_server(max_body=1000, grace=0.1)) as server:
        url, body = f"{server.url}/consistency", b"x" * 20_000_000
        json_only = {"Content-Type": "application/json"}
        for content in (body, (body[n : n + 10**6] for n in range(0, len(body), 10**6))):
            refused = httpx2.post(url, content=content, headers=json_only, timeout=60)
            assert (refused.status_code, list(refused.json())) == (413, ["detail"])
        wrong_type = httpx2.post(url, content=body, timeout=60)
        assert wrong_type.status_code == 415
        assert httpx2.post(f"{server.url}/nothing", content=body, timeout=60).status_code == 404


def test_a_stop_is_not_held_up_by_work_without_end():
    with ServerProcess(color_server(600.0, grace=0.5)) as server:
        answers = []
        first = threading.Thread(target=post, args=(server, answers))
        first.start()
        url = urlsplit(server.url)
        with socket.create_connection((url.hostname, url.port)) as half:
            half.sendall(HALF_A_REQUEST)  # its body never comes
            server.until_logged("looking")
            server.terminate()
            assert server.exit_status() == 1  # requests were cut off
            assert half.recv(4096).startswith(b"HTTP/1.1 503 ")
        first.join()
        assert answers[0].status_code == 503
        assert answers[0].json() == {"detail": "the server is stopping"}
    assert "Traceback" not in "".join(server.log)


def test_a_server_that_cannot_load_ends_with_an_error():
    code = (
        "import sys; from mteditflow.rewards.server import create_app, serve\n"
        "def load(): raise OSError('no such weights')\n"
        "sys.exit(serve(create_app(load)))"
    )
    with ServerProcess(["-c", code], wait_ready=False) as server:
        assert server.exit_status() == 1
    assert "OSError: no such weights" in "".join(server.log)
