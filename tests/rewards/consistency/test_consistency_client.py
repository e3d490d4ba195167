"""The consistency client: the numbers of in-process scoring, or lost with the reason."""

import itertools
import json
import time

import anyio
import pytest
import torch
from consistency_world import (
    PATIENCE,
    ServerProcess,
    color_scorer,
    color_server,
    in_process,
    make_chain,
    make_chains,
    models_server,
)
from PIL import Image

from mteditflow.rewards import (
    AnswerCache,
    AnswerError,
    Background,
    ConsistencyClient,
    ConsistencyScorer,
    Fault,
    Pair,
)
from mteditflow.rewards.consistency.wire import Limits, read_answer
from mteditflow.rewards.server.bodies import Reader
from mteditflow.testing.endpoint import (
    BAD_UNICODE,
    EMPTY,
    ERROR_IN_200,
    HTML,
    JSON_LIST,
    ScriptedServer,
    broken_json,
    changed,
    closed_port,
    completion,
    drip,
    error,
    good,
    huge,
    late,
    plain,
    reset,
    silent,
    truncated,
)
from tests.loops import some

TERMS = ("object", "background", "object_l1", "background_l1")
QUICK = {"back_off": 0.001, "cool_down": 0.02, "max_cool_down": 0.05, "patience": 5.0}
SCORER = color_scorer()


def right(request):
    """What a server answers, computed by the library's own scorer."""
    if request is None:
        return INFO
    images, pairs = Reader(Limits())._read(json.dumps(request).encode())
    scores = SCORER.score_pairs(images, pairs)
    return {"pairs": [each.model_dump() for each in scores], "scorer": INFO["scorer"]}


INFO = {"scorer": "colors", "models": {}, "versions": {}, "limits": Limits().model_dump()}


def served(*script):
    """A scripted server; the first request, for information, is answered well."""
    return ScriptedServer(right, itertools.chain([good], script))


def score(client, chains, images, **options):
    return anyio.run(lambda: client.score(chains, images, **options))


def assert_equal(found, expected, *, atol=0.0):
    assert torch.equal(found.turn_mask, expected.turn_mask)
    for name in TERMS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, equal_nan=True)


def assert_right_or_lost(found, expected, *, atol=0.0):
    """Every turn has its right scores, or is lost; return how many chains are lost."""
    lost = {b for b, _ in found.lost}
    for b in some(range(len(found.turn_mask))):
        turns = found.turn_mask[b].nonzero().flatten().tolist()
        assert turns == expected.turn_mask[b].nonzero().flatten().tolist()
        for name in TERMS:
            ours = getattr(found, name)[b]
            theirs = torch.full_like(ours, torch.nan) if b in lost else getattr(expected, name)[b]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, equal_nan=True)
        assert {n for c, n in found.lost if c == b} == (set(turns) if b in lost else set())
    return len(lost)


# The same numbers


@pytest.mark.parametrize("pairing", ["reference", "consecutive"])
def test_scores_are_those_in_process_bit_by_bit_in_order_for_chains_of_any_length(pairing):
    chains, images = make_chains(range(7))
    with served() as server:
        client = ConsistencyClient([server.url], pairing=pairing)
        found = score(client, chains, images)
    assert not found.lost
    assert found.turn_mask.sum(dim=1).tolist() == [1 + n % 3 for n in range(7)]
    assert_equal(found, in_process(SCORER, chains, images, pairing=pairing))
    assert client.statistics.answered == 8  # the information too


@pytest.mark.slow
def test_scores_of_real_models_are_those_in_process(tiny_models, detector, features):
    chains, images = make_chains(range(24))
    chains = [
        chain.model_copy(
            update={
                "unchanged_objects": (("cat",),) * chain.turns,
                "all_objects": (("cat", "dog"),) * chain.turns,
            }
        )
        for chain in chains
    ]
    expected = in_process(ConsistencyScorer(detector, features), chains, images)
    assert expected.scores.valid.all()
    with ServerProcess(models_server(tiny_models, "--max-wait", "0.05")) as server:
        found = score(ConsistencyClient([server.url]), chains, images)
    assert not found.lost
    assert_equal(found, expected, atol=1e-6)  # batches of other sizes
    assert torch.equal(found.l1_scores.score.isnan(), expected.l1_scores.score.isnan())


def test_images_larger_than_the_size_of_comparison_are_sent_small():
    chain, _ = make_chain(1, turns=1)
    images = [Image.effect_noise((900, 700), 60 + n).convert("RGB") for n in range(2)]
    with served() as server:
        found = score(ConsistencyClient([server.url]), [chain], [images])
        body = server.requests[1].body
    assert_equal(found, in_process(SCORER, [chain], [images]))
    assert len(body) < 2 * 4 * 512 * 512


def test_a_chain_is_encoded_once_and_sent_again_as_it_was():
    chain, images = make_chain(3)
    with served(error(500), error(502)) as server:
        score(ConsistencyClient([server.url], **QUICK), [chain], [images])
        bodies = [request.body for request in server.requests[1:]]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1


def test_a_synchronous_trainer_scores_in_the_background():
    chains, images = make_chains(range(3))
    with served() as server, Background() as background:
        future = background.submit(ConsistencyClient([server.url]).score, chains, images)
        assert_equal(future.result(60), in_process(SCORER, chains, images))


def test_progress_is_shown_when_asked_for(capsys):
    chains, images = make_chains(range(3))
    with served() as server:
        client = ConsistencyClient([server.url])
        score(client, chains, images)
        assert capsys.readouterr().err == ""
        score(client, chains, images, progress=True)
    assert "consistency: 100%" in capsys.readouterr().err


# Faults: what fails once is asked again, what fails every time is lost with its reason


def altered(**terms):
    """The right answer with other terms in its last pair."""

    def change(answer):
        answer["pairs"][-1].update(terms)
        return answer

    return changed(change)


def without(name):
    return changed(lambda answer: {k: v for k, v in answer.items() if k != name})


def resized(change):
    return changed(lambda answer: {**answer, "pairs": change(answer["pairs"])})


FAULTS = {
    "429 with Retry-After": (error(429, Retry_After="0.01"), Fault.rate_limited),
    "503 with Retry-After": (error(503, Retry_After="0.01"), Fault.server_error),
    "500": (error(500), Fault.server_error),
    "502": (error(502), Fault.server_error),
    "500 in HTML": (plain(b"<html>", status=500, Content_Type="text/html"), Fault.server_error),
    "reset": (reset, Fault.connection),
    "truncated": (truncated, Fault.connection),
    "silence": (silent, Fault.timeout),
    "too slow": (late(30.0), Fault.timeout),
    "drip": (drip, Fault.timeout),
    "html": (HTML, Fault.malformed),
    "empty": (EMPTY, Fault.malformed),
    "broken json": (broken_json, Fault.malformed),
    "bad unicode": (BAD_UNICODE, Fault.malformed),
    "json list": (JSON_LIST, Fault.malformed),
    "error in a 200": (ERROR_IN_200, Fault.malformed),
    "huge": (huge, Fault.malformed),
    "no pairs": (without("pairs"), Fault.malformed),
    "no scorer": (without("scorer"), Fault.malformed),
    "other models": (changed(lambda answer: {**answer, "scorer": "other"}), Fault.malformed),
    "a pair too few": (resized(lambda pairs: pairs[:-1]), Fault.wrong_count),
    "a pair too many": (resized(lambda pairs: [*pairs, pairs[0]]), Fault.wrong_count),
    "no scores": (resized(lambda pairs: []), Fault.wrong_count),
    "null for the pairs": (resized(lambda pairs: None), Fault.malformed),
    "another term": (altered(quality=1.0), Fault.malformed),
    "nan": (altered(object_l1=float("nan")), Fault.not_a_number),
    "infinity": (altered(object=float("inf")), Fault.not_a_number),
    "a string": (altered(object_l1="0.5"), Fault.not_a_number),
    "a boolean": (altered(object_l1=True), Fault.not_a_number),
    "a list": (altered(object_l1=[0.5]), Fault.not_a_number),
    "above 1": (altered(object_l1=1.001), Fault.out_of_range),
    "below 0": (altered(background_l1=-1e-9), Fault.out_of_range),
    "a cosine above 1": (altered(object=1.001), Fault.out_of_range),
    "a cosine below -1": (altered(background=-1.001), Fault.out_of_range),
}


def patience(fault, short):
    """Short where a time-out is what is looked for; a busy machine is slow, not wrong."""
    return short if fault is Fault.timeout else PATIENCE


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_changes_no_score(name):
    behavior, fault = FAULTS[name]
    chain, images = make_chain(5)
    with served(behavior) as server:
        client = ConsistencyClient([server.url], timeout=patience(fault, 1.0), **QUICK)
        found = score(client, [chain], [images])
    assert not found.lost
    assert_equal(found, in_process(SCORER, [chain], [images]))
    assert client.statistics.faults == {fault.value: 1}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_loses_all_turns_of_the_chain_with_the_reason(name):
    behavior, fault = FAULTS[name]
    chain, images = make_chain(5, turns=3)
    with served(*[behavior] * 2) as server:
        client = ConsistencyClient([server.url], timeout=patience(fault, 0.3), attempts=2, **QUICK)
        found = score(client, [chain], [images])
        assert len(server.requests) == 3
    assert {key: (lost.fault, lost.attempts) for key, lost in found.lost.items()} == {
        (0, n): (fault, 2) for n in range(3)
    }
    assert all(getattr(found, term).isnan().all() for term in TERMS)
    assert found.scores.invalid_share == 1.0


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_the_server_rejects_is_not_sent_again(status):
    chain, images = make_chain(5)
    with served(error(status, "images[0]: no image")) as server:
        found = score(ConsistencyClient([server.url], **QUICK), [chain], [images])
        assert len(server.requests) == 2
    lost = found.lost[0, 0]
    assert (lost.fault, lost.attempts) == (Fault.rejected, 1)
    assert f"HTTP {status}" in lost.detail
    assert "images[0]: no image" in lost.detail


def test_a_lost_chain_loses_nothing_of_the_others():
    chains, images = make_chains(range(6))
    script = [error(422) if n == 2 else good for n in range(6)]
    with served(*script) as server:
        found = score(ConsistencyClient([server.url], concurrency=1), chains, images)
    assert assert_right_or_lost(found, in_process(SCORER, chains, images)) == 1


def test_nobody_there_loses_everything_in_bounded_time():
    chains, images = make_chains(range(3))
    client = ConsistencyClient([f"http://127.0.0.1:{closed_port()}/v1"], attempts=2, **QUICK)
    found = score(client, chains, images)
    assert {lost.fault for lost in found.lost.values()} == {Fault.connection}
    assert len(found.lost) == sum(chain.turns for chain in chains)
    assert client.statistics.attempts == 2  # only for the information


def test_bad_information_loses_everything_and_the_next_round_asks_again():
    chain, images = make_chain(5)
    with ScriptedServer(right, [HTML, changed(lambda info: {**info, "scorer": ""})]) as server:
        client = ConsistencyClient([server.url], attempts=2, **QUICK)
        assert score(client, [chain], [images]).lost[0, 0].fault is Fault.malformed
        assert not score(client, [chain], [images]).lost


def test_a_server_that_dies_is_left_out_and_another_answers():
    chains, images = make_chains(range(4))
    with served() as server:
        urls = [f"http://127.0.0.1:{closed_port()}/v1", server.url]
        client = ConsistencyClient(urls, **QUICK)
        found = score(client, chains, images)
    assert not found.lost
    assert_equal(found, in_process(SCORER, chains, images))


def test_scores_that_were_not_asked_for_are_not_believed():
    plain_pair = Pair(source=0, edited=1, unchanged_objects=("dog",), all_objects=("dog",))
    cases = [
        (plain_pair.model_copy(update={"unchanged_objects": ()}), "object"),
        (plain_pair.model_copy(update={"all_objects": ()}), "background_l1"),
        (plain_pair.model_copy(update={"background": False}), "background"),
    ]
    for asked, term in some(cases):
        body = json.dumps({"scorer": "a", "pairs": [{term: 0.5}]}).encode()
        with pytest.raises(AnswerError, match=rf"pairs\[0\]: expected no {term}, got a score"):
            read_answer(body, [asked], "a")
        assert read_answer(body, [plain_pair], "a")[0].model_dump()[term] == 0.5


def test_a_cosine_may_round_to_a_little_more_than_1():
    asked = [Pair(source=0, edited=1, unchanged_objects=("dog",))]
    (scores,) = read_answer(b'{"scorer": "a", "pairs": [{"object": 1.0000001}]}', asked, "a")
    assert scores.object == 1.0000001


# Tokens and the cache


def test_the_token_is_sent_and_shown_to_nobody():
    chain, images = make_chain(5)
    token = "a-secret-token"
    with served(error(401, f"wrong token: {token}")) as server:
        found = score(ConsistencyClient([server.url], token=token), [chain], [images])
        assert {each.headers["authorization"] for each in server.requests} == {f"Bearer {token}"}
    assert token not in str(found.lost[0, 0])


def test_accepted_answers_are_found_again_by_content_and_lost_ones_are_asked_again(tmp_path):
    chains, images = make_chains(range(3))
    expected = in_process(SCORER, chains, images)
    with AnswerCache(tmp_path / "answers") as cache, served(error(422), good, good) as server:
        client = ConsistencyClient([server.url], cache=cache, concurrency=1)
        assert assert_right_or_lost(score(client, chains, images), expected) == 1
        assert len(server.requests) == 4
        assert_equal(score(client, chains, images), expected)
        assert len(server.requests) == 5
        assert_equal(score(ConsistencyClient([server.url], cache=cache), chains, images), expected)
        assert len(server.requests) == 6  # information only
        altered_images = [[*shown[:-1], shown[0]] for shown in images]
        found = score(client, chains, altered_images)
        assert_equal(found, in_process(SCORER, chains, altered_images))
        assert len(server.requests) == 9


def test_other_models_do_not_answer_from_the_cache(tmp_path):
    chain, images = make_chain(5)
    with AnswerCache(tmp_path / "answers") as cache:
        for name in ("one", "another"):
            as_named = changed(lambda answer, name=name: {**answer, "scorer": name})
            with ScriptedServer(right, itertools.repeat(as_named)) as server:
                client = ConsistencyClient([server.url], cache=cache)
                assert not score(client, [chain], [images]).lost
                assert len(server.requests) == 2
        assert len(cache) == 2


def test_a_damaged_answer_in_the_cache_is_asked_for_again(tmp_path):
    chain, images = make_chain(5)
    with AnswerCache(tmp_path / "answers") as cache, served() as server:
        client = ConsistencyClient([server.url], cache=cache)
        score(client, [chain], [images])
        (key,) = (row[0] for row in cache._connection.execute("SELECT key FROM answers"))
        cache.put(key, '{"pairs": [], "scorer": "colors"}')
        found = score(client, [chain], [images])
        assert len(server.requests) == 3
    assert_equal(found, in_process(SCORER, [chain], [images]))


# What the caller did wrong


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda c, i: ([], []), ValueError, "expected one for each of one or more chains"),
        (lambda c, i: (c, i[:-1]), ValueError, "expected one list for each of 2 chains, got 1"),
        (lambda c, i: (c, [i[0], i[1][:-1]]), ValueError, "images: expected 3 for chain '1'"),
        (lambda c, i: (c, [i[0], [*i[1][:-1], "x"]]), TypeError, r"images\[1\]\[2\]: expected a"),
        (lambda c, i: (c, [[Image.new("I;16", (4, 4)), i[0][1]], i[1]]), ValueError, r"\[0\]\[0\]"),
        (
            lambda c, i: (
                [c[0], c[1].model_copy(update={"unchanged_objects": None, "all_objects": None})],
                i,
            ),
            ValueError,
            "chain '1': expected unchanged_objects or all_objects",
        ),
    ],
)
def test_chains_and_images_that_do_not_fit_are_errors_and_nothing_is_sent(change, kind, message):
    chains, images = change(*make_chains(range(2)))
    with served() as server:
        with pytest.raises(kind, match=message):
            score(ConsistencyClient([server.url]), chains, images)
        assert len(server.requests) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoints": ["http://127.0.0.1:8200"]}, "endpoints: expected URLs that end in /v1"),
        ({"pairing": "all"}, "pairing: expected one of"),
        ({"token": "two\nlines"}, "secret: expected a key or token of printable ASCII"),
        ({"chains_at_once": 0}, "chains_at_once: expected an integer >= 1"),
        ({"attempts": 0}, "attempts: expected an integer >= 1"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyClient(**{"endpoints": ["http://127.0.0.1:8200/v1"], **options})


# A real server that comes and goes


@pytest.mark.slow
@pytest.mark.parametrize("restart", [True, False])
def test_a_server_killed_during_a_run_gives_right_scores_or_none(restart):
    chains, images = make_chains(range(40))
    options = {"patience": 60.0, "attempts": 100} if restart else {"patience": 1.0, "attempts": 2}
    with ServerProcess(color_server(0.05, max_batch=2)) as server, Background() as background:
        client = ConsistencyClient([server.url], **{**QUICK, "concurrency": 8, **options})
        future = background.submit(client.score, chains, images)
        while client.statistics.answered < 11:
            time.sleep(0.01)
        server.process.kill()
        if restart:
            server.process.wait()
            with ServerProcess(color_server(0.05, port=server.port)):
                found = future.result(PATIENCE)
        else:
            found = future.result(PATIENCE)
    lost = assert_right_or_lost(found, in_process(SCORER, chains, images))
    assert lost == 0 if restart else 0 < lost <= 30


@pytest.mark.slow
def test_a_server_that_stops_in_order_during_a_run_loses_nothing_that_it_had():
    chains, images = make_chains(range(12))
    options = {**QUICK, "attempts": 2, "patience": 0.5}
    with ServerProcess(color_server(0.1, max_batch=2)) as server, Background() as background:
        client = ConsistencyClient([server.url], **options)
        future = background.submit(client.score, chains, images)
        while client.statistics.answered < 3:
            time.sleep(0.01)
        server.terminate()
        found = future.result(PATIENCE)
        assert server.exit_status() == 0  # nothing was cut off
    assert_right_or_lost(found, in_process(SCORER, chains, images))


def test_a_run_may_be_rewarded_by_both_pairings_at_once(tmp_path):
    """The terms of the trainer's services, and what the command line refuses of them."""
    config = pytest.importorskip("mteditflow_examples.flux.config")
    from mteditflow_examples.flux.scoring import Services

    chains, images = make_chains(range(5))
    longest = max(chain.turns for chain in chains)
    answer = json.dumps({"turns": [{"analysis": "a", "score": 4}] * longest})
    with served() as server, ScriptedServer(lambda _: completion(answer)) as judge:
        given = {"judge": (judge.url,), "judge_model": "m", "consistency": (server.url,)}
        rewards = config.Rewards(**given, terms="l1", pairing="both")
        with AnswerCache(tmp_path / "answers") as cache:
            found = anyio.run(Services(rewards, cache).score, chains, images)
    assert set(found) == {"following", "consistency", "consecutive"}
    for term, pairing in some((("consistency", "reference"), ("consecutive", "consecutive"))):
        expected = in_process(SCORER, chains, images, pairing=pairing).l1_scores
        torch.testing.assert_close(found[term].score, expected.score, equal_nan=True)
    assert not torch.equal(found["consistency"].score, found["consecutive"].score)
