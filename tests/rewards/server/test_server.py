"""The consistency server: in process over ASGI, and as its users start it."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import threading
import time

import httpx2
import pytest
from consistency_world import (
    ColorDetector,
    color_scorer,
    pair,
    picture,
    request_of,
    scores_of,
)
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from mteditflow._hub import explaining_hub
from mteditflow.rewards import ConsistencyScorer
from mteditflow.rewards.consistency.wire import (
    MAX_IMAGES,
    MAX_NAME,
    MAX_NAMES,
    MAX_PAIRS,
    ConsistencyRequest,
    to_send,
)
from mteditflow.rewards.images import png_base64
from mteditflow.rewards.server import Limits, create_app, serve
from mteditflow.rewards.server.__main__ import TOKEN_VARIABLE, read_token
from mteditflow.rewards.server.__main__ import app as command_line
from mteditflow.rewards.server.bodies import ReadToEnd
from mteditflow.rewards.server.serving import check_host, listen
from mteditflow.testing.endpoint import closed_port
from tests.loops import some

URL = "/v1/consistency"
TOKEN = "a-secret-token"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(color_scorer())) as client:
        yield client


@pytest.fixture
def images():
    return [picture(n) for n in range(3)]


def base64_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def detail(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["detail"]
    return response.json()["detail"]


# What comes back


def test_scores_are_those_of_the_scorer_in_process_bit_by_bit(client, images):
    pairs = [pair(0, 1), pair(0, 2), pair(1, 2, background=False), pair(2, 2, all_objects=())]
    response = client.post(URL, json=request_of(images, pairs))
    assert response.status_code == 200
    assert scores_of(response.json()) == color_scorer().score_pairs(images, pairs)
    assert response.json()["pairs"][3] == {
        "object": None,
        "background": None,
        "object_l1": 1.0,
        "background_l1": None,
    }


def test_scores_of_real_models_are_those_in_process(detector, features, images):
    scorer = ConsistencyScorer(detector, features)
    names = {"unchanged_objects": ("cat",), "all_objects": ("cat", "dog")}
    pairs = [pair(0, 1, **names), pair(0, 2, **names)]
    expected = scorer.score_pairs(images, pairs)
    assert all(x.object is not None and x.background is not None for x in some(expected))
    with TestClient(create_app(scorer)) as client:
        answer = client.post(URL, json=request_of(images, pairs)).json()
    assert scores_of(answer) == expected  # one chain alone: the same batch as in process


def test_an_image_sent_at_the_size_of_comparison_scores_as_the_large_one(client):
    large = [picture(n, size=700) for n in range(2)]
    small = [to_send("image", image) for image in large]
    assert {image.size for image in small} == {(512, 512)}
    answers = [client.post(URL, json=request_of(x, [pair()])).json() for x in (large, small)]
    assert answers[0] == answers[1]
    assert scores_of(answers[0]) == color_scorer().score_pairs(large, [pair()])


@pytest.mark.parametrize(
    "encoded",
    [
        base64_of(picture(1), "PNG"),
        base64_of(picture(1), "WEBP", lossless=True),
        base64_of(picture(1).quantize(8).convert("RGB"), "PNG", compress_level=9),
    ],
)
def test_every_lossless_form_of_an_image_scores_as_its_pixels(client, encoded):
    data = base64.b64decode(encoded)
    body = request_of([picture(0)], [pair()]) | {"images": [png_base64(picture(0)), encoded]}
    with Image.open(io.BytesIO(data)) as image:
        expected = color_scorer().score_pairs([picture(0), image.convert("RGB")], [pair()])
    assert scores_of(client.post(URL, json=body).json()) == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes_of_8_bits_are_converted_as_in_process(client, mode):
    image = picture(3).convert(mode)
    body = request_of([picture(3)], [pair()])
    body["images"].append(base64_of(image))
    assert scores_of(client.post(URL, json=body).json()) == color_scorer().score_pairs(
        [picture(3), image], [pair()]
    )


def test_info_names_the_models_and_the_limits(detector, features):
    limits = Limits(max_requests=7)
    with TestClient(create_app(ConsistencyScorer(detector, features), limits=limits)) as client:
        info = client.get("/v1/info").json()
    assert info["limits"]["max_requests"] == 7
    assert info["models"]["tokens"] == "strict"
    assert info["models"]["detector"]["threshold"] == 0.35
    assert len(info["models"]["features"]["weights"]["model"]) == 64
    assert "torch" in info["versions"]


def test_whatever_decides_on_a_score_is_in_the_identity(detector, features):
    def identity(scorer):
        with TestClient(create_app(scorer)) as client:
            return client.get("/v1/info").json()["scorer"]

    same = identity(ConsistencyScorer(detector, features))
    assert identity(ConsistencyScorer(detector, features, batch_size=3)) == same
    others = [
        ConsistencyScorer(detector, features, tokens="compat"),
        ConsistencyScorer(detector),
        color_scorer(),
    ]
    assert len({same, *map(identity, others)}) == 4
    weight = next(features.model.parameters())
    with_other_weights = weight.data.clone()
    weight.data[..., 0] += 1e-3
    try:
        assert identity(ConsistencyScorer(detector, features)) != same
    finally:
        weight.data.copy_(with_other_weights)


def find_balls(images, names):
    return ColorDetector()(images, names)


def find_nothing(images, names):
    return ColorDetector()(images, [()] * len(names))


def test_a_detector_that_is_a_function_is_known_by_its_name():
    scorers = set()
    for find in (find_balls, find_nothing):
        with TestClient(create_app(ConsistencyScorer(find))) as client:
            info = client.get("/v1/info").json()
        assert info["models"]["detector"]["class"] == f"{__name__}.{find.__name__}"
        scorers.add(info["scorer"])
    assert len(scorers) == 2


# What is refused, and how

GOOD = request_of([picture(0), picture(1)], [pair()])
TOO_MANY = ["red ball"] * (MAX_NAMES + 1)


def altered(**changes):
    return {**GOOD, **changes}


def with_pair(**changes):
    return altered(pairs=[{**GOOD["pairs"][0], **changes}])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (altered(pairs=[]), "pairs: Tuple should have at least 1 item"),
        (altered(images=[]), "images: Tuple should have at least 1 item"),
        (altered(images=GOOD["images"][:1] * (MAX_IMAGES + 1)), "images: Tuple should have at"),
        (altered(pairs=GOOD["pairs"] * (MAX_PAIRS + 1)), "pairs: Tuple should have at most"),
        (altered(images=[1, 2]), "images.0: Input should be a valid string"),
        (altered(more=1), "body: Extra inputs are not permitted"),
        (with_pair(secret=1), "pairs.0: Extra inputs are not permitted"),
        ({"images": GOOD["images"]}, "pairs: Field required"),
        ([], "body: Input should be"),
        (with_pair(source=-1), "pairs.0.source: Input should be greater than or equal to 0"),
        (with_pair(source=1.5), "pairs.0.source: Input should be a valid integer"),
        (with_pair(source="0"), "pairs.0.source: Input should be a valid integer"),
        (with_pair(source=True), "pairs.0.source: Input should be a valid integer"),
        (with_pair(edited=2), r"^body: pairs\[0\].edited: expected an index of one of the 2 im"),
        (with_pair(edited=10**400), "pairs.0.edited: Input should be less than 65"),
        (with_pair(background="yes"), "pairs.0.background: Input should be a valid boolean"),
        (with_pair(unchanged_objects="red ball"), "pairs.0.unchanged_objects: Input should be"),
        (with_pair(unchanged_objects=TOO_MANY), "pairs.0.unchanged_objects: Tuple should have"),
        (with_pair(all_objects=[""]), "pairs.0.all_objects.0: String should have at least 1"),
        (with_pair(all_objects=[" "]), "pairs.0.all_objects.0: String should match"),
        (with_pair(all_objects=["x" * (MAX_NAME + 1)]), "pairs.0.all_objects.0: String should"),
        (with_pair(all_objects=[None]), "pairs.0.all_objects.0: Input should be a valid string"),
    ],
)
def test_a_body_that_is_no_request_is_refused_with_the_place_and_the_reason(client, body, message):
    import re

    told = detail(client.post(URL, json=body), 422)
    assert re.search(message, told), told


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b'"\xff"', b"[" * 10**5, b"NaN", b"\x00", b"{}" * 9],
)
def test_a_body_that_is_no_json_is_refused(client, body):
    assert detail(client.post(URL, content=body, headers=JSON), 422).startswith("body: ")


def test_an_error_does_not_repeat_what_was_sent(client):
    secret = "do-not-repeat-me"
    bodies = [
        {secret: secret},
        altered(images=[secret, secret]),
        altered(images=[base64.b64encode(secret.encode()).decode()] * 2),
        with_pair(
            source=secret, background=secret, all_objects=secret, unchanged_objects=[[secret]]
        ),
        with_pair(**{secret: 1}),
        secret,
    ]
    for body in some(bodies):
        assert secret not in detail(client.post(URL, json=body), 422)
    assert secret not in detail(client.post(URL, content=secret, headers=JSON), 422)


def test_at_most_a_few_of_many_errors_are_told(client):
    told = detail(client.post(URL, json=altered(images=[1] * 60)), 422)
    assert told.count("valid string") == 5
    assert told.endswith(" more")


def test_a_body_of_another_type_is_refused(client):
    headers = [{"Content-Type": "text/plain"}, {}, {**JSON, "Content-Encoding": "gzip"}]
    for each in some(headers):
        response = client.post(URL, content=json.dumps(GOOD).encode(), headers=each)
        assert detail(response, 415) == "expected application/json that is not compressed"
    response = client.post(
        URL, content=json.dumps(GOOD), headers={"Content-Type": "Application/JSON; charset=utf-8"}
    )
    assert response.status_code == 200


def test_other_routes_and_methods_are_errors_in_json(client):
    assert detail(client.get("/nothing"), 404) == "Not Found"
    assert detail(client.get(URL), 405) == "Method Not Allowed"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused_announced_or_not(chunked):
    body = json.dumps(GOOD).encode()
    pieces = iter([body[:100], body[100:]]) if chunked else body
    with TestClient(create_app(color_scorer(), limits=Limits(max_body=len(body) - 1))) as client:
        response = client.post(URL, content=pieces, headers=JSON)
    assert detail(response, 413) == f"body: expected at most {len(body) - 1} bytes, got more"


def test_a_body_of_just_the_limit_is_read():
    body = json.dumps(GOOD).encode()
    with TestClient(create_app(color_scorer(), limits=Limits(max_body=len(body)))) as client:
        assert client.post(URL, content=iter([body]), headers=JSON).status_code == 200


def test_an_image_that_is_too_large_is_refused():
    with TestClient(create_app(color_scorer(), limits=Limits(max_pixels=1000))) as client:
        told = detail(client.post(URL, json=GOOD), 413)
    assert told == "images[0]: expected at most 1000 pixels, got 32 x 32"


# Tokens


@pytest.fixture(scope="module")
def guarded():
    with TestClient(create_app(color_scorer(), token=TOKEN)) as client:
        yield client


@pytest.mark.parametrize(
    "header",
    [None, "Bearer wrong", "Bearer", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer ä"],
)
@pytest.mark.parametrize(("method", "path"), [("POST", URL), ("GET", "/v1/info")])
def test_without_the_token_nothing_is_served(guarded, header, method, path):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = guarded.request(method, path, headers=headers, content=b"x" * 100)
    told = detail(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"
    assert told == "expected this server's bearer token"


def test_with_the_token_chains_are_scored(guarded):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.post(URL, json=GOOD, headers=headers).status_code == 200
    assert guarded.get("/v1/info", headers=headers).status_code == 200


def test_health_and_documentation_need_no_token(guarded):
    assert guarded.get("/health").json() == {"status": "ready"}
    assert "HTTPBearer" in guarded.get("/openapi.json").json()["components"]["securitySchemes"]


@pytest.mark.parametrize("token", ["", "two words", "tökén", "line\n"])
def test_a_token_that_no_header_can_carry_is_refused(token):
    with pytest.raises(
        ValueError, match="token: expected printable ASCII without spaces"
    ) as caught:
        create_app(color_scorer(), token=token)
    assert not token or token not in str(caught.value)


# Busy, broken, gone


class Held(ColorDetector):
    """Waits until it is let go; fails if told to."""

    def __init__(self):
        self.begun, self.go, self.fails = threading.Event(), threading.Event(), False

    def __call__(self, images, names):
        self.begun.set()
        assert self.go.wait(60)
        if self.fails:
            raise RuntimeError("out of memory: secret-of-the-server")
        return super().__call__(images, names)


def test_a_full_server_says_when_to_try_again_and_serves_again_later():
    held = Held()
    app = create_app(ConsistencyScorer(held), limits=Limits(max_requests=1))
    with TestClient(app) as client:
        answers = []
        first = threading.Thread(target=lambda: answers.append(client.post(URL, json=GOOD)))
        first.start()
        assert held.begun.wait(60)
        full = client.post(URL, json=GOOD)
        assert detail(full, 503) == "1 requests are being served, try later"
        assert full.headers["retry-after"] == "1"
        held.go.set()
        first.join()
        assert answers[0].status_code == client.post(URL, json=GOOD).status_code == 200


def test_a_failure_of_the_models_is_told_without_its_words_and_the_next_request_is_served(caplog):
    held = Held()
    held.go.set()
    held.fails = True
    with TestClient(create_app(ConsistencyScorer(held))) as client:
        told = detail(client.post(URL, json=GOOD), 500)
        assert told == "scoring failed; see the server's log"
        assert "secret-of-the-server" in caplog.text
        held.fails = False
        assert client.post(URL, json=GOOD).status_code == 200


class Terse(ColorDetector):
    """Refuses long names, as models do that take a number of tokens."""

    def __call__(self, images, names):
        if any(len(name) > 100 for each in names for name in each):
            raise ValueError("names: expected at most 100 tokens each, got more")
        return super().__call__(images, names)


def test_a_chain_that_the_models_refuse_is_not_called_a_failure_of_the_server():
    body = with_pair(all_objects=["long " * 30])
    with TestClient(create_app(ConsistencyScorer(Terse()))) as client:
        told = detail(client.post(URL, json=body), 422)
        assert told.startswith("the models refuse this chain: names: expected at most"), told
        assert client.post(URL, json=GOOD).status_code == 200


class Wrong(ConsistencyScorer):
    """Gives an answer too few."""

    def score_many(self, work):
        return [answers[:-1] for answers in super().score_many(work)]


def test_a_wrong_number_of_scores_is_never_sent():
    with TestClient(create_app(Wrong(ColorDetector()))) as client:
        assert client.post(URL, json=GOOD).status_code == 500


def test_a_server_that_loads_or_could_not_load_says_so():
    loading, go = threading.Event(), threading.Event()

    def load():
        loading.set()
        assert go.wait(60)
        raise OSError("no such weights")

    with TestClient(create_app(load)) as client:
        assert loading.wait(60)
        for status in ("loading", "broken"):
            while client.get("/health").json()["status"] != status:
                time.sleep(0.01)
            assert client.get("/health").status_code == 503
            for response in (client.post(URL, json=GOOD), client.get("/v1/info")):
                assert detail(response, 503) == f"the server is {status}"
                assert int(response.headers["retry-after"]) >= 10
            go.set()


def test_a_model_of_the_hub_that_cannot_be_read_is_one_line_of_the_log(caplog):
    def load():
        with explaining_hub("detector", "some/model"):
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    with TestClient(create_app(load)) as client:
        while client.get("/health").json()["status"] != "broken":
            time.sleep(0.01)
    (record,) = [x for x in caplog.records if "could not be loaded" in x.message]
    assert "detector: expected a model that can be read, got some/model: " in record.message
    assert record.exc_info is None


def test_a_token_that_is_no_text_names_its_option(tmp_path):
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    ended = CliRunner().invoke(command_line, ["--token-file", str(tmp_path / "token")])
    assert ended.exit_code == 2
    assert ended.output.startswith("error: --token-file: 'utf-8' codec can't decode")


def test_an_application_that_nobody_started_refuses_instead_of_waiting_and_can_start_twice():
    app = create_app(color_scorer())
    assert detail(TestClient(app).post(URL, json=GOOD), 503) == "the server is loading"
    for _ in range(2):
        with TestClient(app) as client:
            assert client.post(URL, json=GOOD).status_code == 200


def test_a_server_that_stops_refuses_what_is_new():
    app = create_app(color_scorer())
    with TestClient(app) as client:
        app.state.service.stop()
        assert detail(client.post(URL, json=GOOD), 503) == "the server is stopping"
        assert client.get("/health").json() == {"status": "stopping"}


# Until a signal


def serve_here(app, visit, **options):
    """Exit status of a server in this process; it gets SIGTERM once ``visit(port)`` has ended."""

    def early(*_):
        raise AssertionError("SIGTERM before the server took signals")

    def run():
        try:
            visit(port)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    port, before = closed_port(), signal.signal(signal.SIGTERM, early)
    visitor = threading.Thread(target=run)
    visitor.start()
    try:
        return serve(app, port=port, **options)
    finally:
        visitor.join()
        signal.signal(signal.SIGTERM, before)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def no_exit(monkeypatch):
    """A server whose models are at work would end the process of the tests."""
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"ended with {code}"))


def seconds_to_stop():
    """From the signal to the end of a server that answers its last request in between."""
    held, answers, told = Held(), [], []
    app = create_app(ConsistencyScorer(held))

    def ask(port):
        answers.append(httpx2.post(f"http://127.0.0.1:{port}{URL}", json=GOOD, timeout=60))

    def let_go():
        wait_until(lambda: app.state.service.state == "stopping")
        held.go.set()

    threads = [threading.Thread(target=let_go)]

    def visit(port):
        wait_until(lambda: app.state.service.state == "ready")
        threads.append(threading.Thread(target=ask, args=(port,)))
        for thread in threads:
            thread.start()
        assert held.begun.wait(60)
        told.append(time.monotonic())

    status = serve_here(app, visit)
    ended = time.monotonic()
    for thread in threads:
        thread.join()
    assert (status, answers[0].status_code) == (0, 200)
    return ended - told[0]


def test_a_server_that_is_stopped_ends_soon_after_its_last_answer(no_exit):
    """The best of a few times: a busy machine is slow, not wrong."""
    assert any(seconds_to_stop() < 1 for _ in range(5))


def test_a_server_that_cuts_requests_off_ends_with_status_1(no_exit):
    app, halves = create_app(color_scorer()), []

    def send_half_a_request(port):
        wait_until(lambda: app.state.service.state == "ready")
        halves.append(socket.create_connection(("127.0.0.1", port)))
        head = f"POST {URL} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        halves[0].sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        wait_until(lambda: app.state.service.busy)

    assert serve_here(app, send_half_a_request, grace=0.05) == 1
    with halves[0] as half:
        assert half.recv(4096).startswith(b"HTTP/1.1 503 ")


def test_a_server_that_could_not_load_ends_by_itself_with_status_1(caplog):
    def load():
        raise OSError("no such weights")

    assert serve(create_app(load)) == 1
    assert "no such weights" in caplog.text


def test_a_grace_below_0_is_refused():
    with pytest.raises(ValueError, match=r"^grace: expected .*, got -1"):
        serve(create_app(color_scorer()), grace=-1)


def scope(path=URL, **headers):
    lines = {"content-type": "application/json", **headers}
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in lines.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
    }


async def exchange(app, messages, **headers):
    """Give an application these messages, then nothing more; return what it sent."""
    arrivals = asyncio.Queue()
    for message in messages:
        arrivals.put_nowait(message)
    sent = []

    async def send(message):
        sent.append(message)

    await app(scope(**headers), arrivals.get, send)
    return sent, arrivals.qsize()


def body_message(body, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


def test_work_of_a_client_that_is_gone_is_dropped_before_it_starts():
    async def main():
        held = Held()
        app = create_app(ConsistencyScorer(held), limits=Limits(max_batch=1))
        async with app.router.lifespan_context(app):
            whole = [body_message(json.dumps(GOOD).encode())]
            first = asyncio.create_task(exchange(app, whole))
            while not held.begun.is_set():
                await asyncio.sleep(0.01)
            sent, _ = await exchange(app, [*whole, {"type": "http.disconnect"}])
            assert sent[0]["status"] == 499
            assert app.state.service.busy  # with the first one
            held.begun.clear()
            held.go.set()
            sent, _ = await first
            assert sent[0]["status"] == 200
            await asyncio.sleep(0.1)
            assert not held.begun.is_set()
            assert not app.state.service.busy

    asyncio.run(main())


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind():
    async def main():
        app = create_app(color_scorer())
        async with app.router.lifespan_context(app):
            messages = [body_message(b"{", more=True), {"type": "http.disconnect"}]
            sent, _ = await exchange(app, messages)
            assert sent[0]["status"] == 499
            assert not app.state.service.busy

    asyncio.run(main())


def test_a_body_that_does_not_come_in_time_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("mteditflow.rewards.server.bodies.DISCARDING", 0.05)

    async def main():
        app = create_app(color_scorer(), limits=Limits(read_timeout=0.05))
        async with app.router.lifespan_context(app):
            sent, _ = await exchange(app, [body_message(b"{", more=True)])
            assert sent[0]["status"] == 408
            assert not app.state.service.busy

    asyncio.run(main())


@pytest.mark.parametrize("discarded", [10**9, 250])
def test_an_early_answer_waits_for_the_end_of_the_request_but_not_for_ever(monkeypatch, discarded):
    monkeypatch.setattr("mteditflow.rewards.server.bodies.DISCARDED", discarded)

    async def early(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    messages = [body_message(b"x" * 100, more=n < 9) for n in range(10)]
    sent, left = asyncio.run(exchange(ReadToEnd(early, closing=lambda: False), messages))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert left == (0 if discarded > 1000 else 7)


# The documentation


def test_the_documented_example_is_served(client):
    schema = client.get("/openapi.json").json()
    reference = schema["paths"][URL]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert reference == {"$ref": "#/components/schemas/ConsistencyRequest"}
    request = schema["components"]["schemas"]["ConsistencyRequest"]
    assert request["properties"]["pairs"]["items"]["$ref"] == "#/components/schemas/PairRequest"
    assert request["properties"]["images"]["maxItems"] == MAX_IMAGES
    (example,) = request["examples"]
    assert client.post(URL, json=example).status_code == 200
    assert ConsistencyRequest.model_validate_json(json.dumps(example)).pairs[0].background
    assert "/v1/info" in schema["paths"]
    answers = schema["paths"][URL]["post"]["responses"]
    assert {"200", "401", "408", "413", "415", "422", "500", "503"} == set(answers)


# Who may reach it


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_other_machines_are_served_only_with_a_token(host, caplog):
    with pytest.raises(ValueError, match=r"^host: expected the loopback, or a token") as refused:
        check_host(host, secured=False)
    assert str(refused.value).endswith("; give one by MTEDITFLOW_TOKEN or --token-file")
    check_host(host, secured=True)
    assert "HTTP hides neither token nor images" in caplog.text


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", "AF_INET"), ("::1", "AF_INET6")])
def test_an_address_is_listened_on_by_its_family(host, family):
    with listen(host, 0) as listener:
        assert listener.family.name == family
        assert listener.getsockname()[0] == host
        with pytest.raises(OSError, match=f"^{host}:{listener.getsockname()[1]}: cannot be "):
            listen(host, listener.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_the_loopback_needs_no_token(host, caplog):
    check_host(host, secured=False)
    assert not caplog.text


def test_the_command_line_refuses_other_machines_without_a_token():
    done = CliRunner().invoke(command_line, ["--host", "0.0.0.0"])
    assert done.exit_code == 2
    assert "MTEDITFLOW_TOKEN" in done.output


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "of-the-environment")
    assert read_token(None) == "of-the-environment"
    (tmp_path / "token").write_text(" of-the-file\n")
    assert read_token(tmp_path / "token") == "of-the-file"
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ValueError, match=r"token: expected one in .*token, got nothing"):
        read_token(tmp_path / "token")
