"""Runs that are killed or stopped at any moment end as if nothing had been."""

import re
import signal
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from mteditflow_examples.lost_rewards import settings

from tests.flux.killing import KEEP, MORE, differences, kill_at_random, live, logged
from tests.flux.mortal_services import ANSWERED, ASKED, Mortal, judged
from tests.flux.worlds import ENVIRONMENT, SCRIPT, options, run
from tests.loops import some
from tests.processes import Process

KILLED, STOPPED = -signal.SIGKILL, 0
SMALL = (*MORE, "--data.groups", 2)


@pytest.fixture(scope="session")
def undisturbed(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(*options(world, folder, *SMALL, *KEEP), drawn=True)
    return folder


def lives_through(world, folder, undisturbed, points):
    """One life after the other, each to its point, and a last one to the end."""
    arguments = options(world, folder, *SMALL)
    for point in some(points):
        life = live(arguments, folder, point=point)
        code = KILLED if point.endswith("KILL") else STOPPED
        assert (life.code, life.ended) == (code, False), (point, life.told[-3000:])
        assert differences(folder, undisturbed, ended=False) == [], point
    life = live(arguments, folder)
    assert life.ended, life.told[-3000:]
    assert differences(folder, undisturbed) == []


@pytest.mark.slow
def test_kills_and_signals(world, undisturbed, tmp_path):
    points = (
        "evaluating image 3 KILL",  # half an image of the first evaluation
        "other fsync 1 KILL",  # the numbers of round 1, before there is any checkpoint
        "sampling phase 1 TERM",
        "saving rename 1 KILL",  # all of the checkpoint of round 2 but its name
        "updating phase 2 TERM",
        "evaluating phase 1 TERM",  # after round 4: done again, and marked in its checkpoint
    )
    lives_through(world, tmp_path, undisturbed, points)
    scores = [checkpoint_score(tmp_path, done) for done in (4, 6)]
    assert scores == [checkpoint_score(undisturbed, done) for done in (4, 6)]
    assert None not in scores


@pytest.mark.long
def test_kills_while_other_files_are_written(world, undisturbed, tmp_path):
    points = (
        "drawing replace 1 KILL",
        "saving fsync 4 KILL",
        "saving fsync 12 KILL",
        "updating phase 4 KILL",
        "evaluating replace 1 KILL",  # an evaluation's numbers
        "saving rmdir 1 KILL",  # an old checkpoint goes
    )
    lives_through(world, tmp_path, undisturbed, points)


@pytest.mark.long
def test_signals_in_every_phase(world, undisturbed, tmp_path):
    points = (
        "evaluating phase 1 TERM",  # before the first round
        "sampling phase 1 TERM",
        "updating phase 1 TERM",
        "saving phase 1 TERM",
        "updating phase 2 TERM",
        "evaluating phase 1 TERM",
        "sampling phase 1 TERM",
    )
    lives_through(world, tmp_path, undisturbed, points)


def checkpoint_score(folder, done):
    manifest = folder / "checkpoints" / f"round-{done:06d}" / "manifest.json"
    return re.search(r'"score": (\S+),', manifest.read_text())[1]


@pytest.mark.long
@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_kills_at_random_moments(world, tmp_path, objective):
    lives = kill_at_random(world, tmp_path, objective=objective, kills=3, seed=0)
    assert {life.code for life in lives} <= {0, KILLED}
    assert [life.wrong for life in lives] == [[]] * len(lives)


class Served:
    """A run whose judge and consistency server can be killed, and who asks nothing twice."""

    def __init__(self, world, folder, *, delays=(0.2, 0.1)):
        folder.mkdir()
        self.folder, self.errors = folder / "run", folder / "errors.txt"
        self.judge = Mortal("judge", folder, delay=delays[0])
        self.consistency = Mortal("consistency", folder, delay=delays[1])
        preset = folder / "served.toml"
        preset.write_text(settings())
        services = ("--rewards.judge", self.judge.url, "--rewards.consistency")
        more = (*MORE, *services, self.consistency.url, "--rewards.max-invalid", 0)
        self.arguments = [str(preset), *options(world, self.folder, *more)[1:]]
        self.unkept = 0  # answers that may have to be asked for again

    @contextmanager
    def living(self, *more):
        """Run the trainer; what is left of it in the end is killed."""
        errors = self.errors
        program = [SCRIPT, *self.arguments, *more]
        with Process(program, env=ENVIRONMENT, output=errors, errors=errors) as process:
            self.process = process
            try:
                yield
            finally:
                process.kill()

    def wait(self, what, *, timeout=120):
        deadline = time.monotonic() + timeout
        while not what():
            assert time.monotonic() < deadline, logged(self.folder)
            assert self.process.poll() is None, logged(self.folder)
            time.sleep(0.02)

    def end(self, *, timeout=300):
        return self.process.wait(timeout)

    def reaches(self, service, more):
        """Wait until a service was asked for some answers more, of which one is on its way."""
        before = len(service.events(ASKED))
        self.wait(lambda: len(service.events(ASKED)) >= before + more)

    def kill(self, what):
        """Kill a service or the trainer; count what it had answered in vain."""
        what.kill()
        if what is self.process:
            what.wait()
        time.sleep(1)  # what is on its way arrives, or never does
        cache = self.folder / "answers-0.sqlite"
        self.unkept += len(set(self.judge.events(ANSWERED))) - judged(cache)

    @property
    def asked_again(self):
        answered = self.judge.events(ANSWERED)
        return len(answered) - len(set(answered))


@pytest.fixture(scope="session")
def undisturbed_served(world, tmp_path_factory):
    served = Served(world, tmp_path_factory.mktemp("undisturbed_served") / "all")
    with served.judge, served.consistency, served.living(*KEEP):
        assert served.end() == 0, logged(served.folder)
    return SimpleNamespace(folder=served.folder, asked_again=served.asked_again)


@pytest.fixture(scope="session")
def begun_served(world, tmp_path_factory):
    """The checkpoints of the first two rounds of that run."""
    served = Served(world, tmp_path_factory.mktemp("begun_served") / "all", delays=(0, 0))
    with served.judge, served.consistency, served.living(*KEEP):
        served.wait((served.folder / "checkpoints" / "round-000002").exists)
    return served.folder


@pytest.mark.long
def test_services_and_trainer_are_killed(world, undisturbed_served, tmp_path):
    served = Served(world, tmp_path / "all")
    with served.judge as judge, served.consistency as consistency:
        with served.living():
            served.reaches(judge, 6)
            served.kill(judge)
            time.sleep(4)
            judge.start()
            served.reaches(consistency, 30)
            served.kill(consistency)
            time.sleep(4)
            consistency.start()
            served.reaches(judge, 14)
            served.kill(served.process)
        with served.living():
            served.reaches(judge, 2)
            served.kill(judge)
            served.kill(served.process)
        with served.living():  # its judge is away when it starts again
            assert served.end() == 2
        judge.start()
        with served.living():
            assert served.end() == 0, logged(served.folder)
    assert "error: rewards.judge: expected an answer from" in served.errors.read_text()
    assert differences(served.folder, undisturbed_served.folder) == []
    assert served.asked_again <= undisturbed_served.asked_again + served.unkept


@pytest.mark.long  # test_resuming has one without servers
def test_lost_rewards_end_a_run_that_goes_on_later(world, undisturbed_served, tmp_path):
    served = Served(world, tmp_path / "all")
    with served.judge as judge, served.consistency:
        with served.living():
            served.reaches(judge, 24)
            served.kill(judge)
            judge.start(lost=1.0)
            assert served.end() == 1
        assert re.search(r"error: .*% of 16 rewards are invalid", logged(served.folder))
        assert differences(served.folder, undisturbed_served.folder, ended=False) == []
        judge.kill()
        judge.start()
        with served.living():
            assert served.end() == 0, logged(served.folder)
    assert differences(served.folder, undisturbed_served.folder) == []


@pytest.mark.slow
def test_a_signal_does_not_wait_for_a_judge_that_is_away(world, begun_served, tmp_path):
    served = Served(world, tmp_path / "all")
    with served.judge as judge, served.consistency, served.living():
        served.reaches(judge, 24)
        served.kill(judge)
        served.process.send_signal(signal.SIGTERM)
        assert served.end(timeout=15) == 0
    assert "stopped by SIGTERM after round" in logged(served.folder)
    assert (served.folder / "checkpoints" / "round-000001").exists()
    assert differences(served.folder, begun_served, ended=False) == []
