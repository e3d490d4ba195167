"""Termination: asked between rounds, by every rank together."""

import os
import signal
import threading

import pytest
import torch
from torch import distributed as dist

from mteditflow.training import Termination

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_loop_goes_on(number):
    with Termination() as termination:
        assert not termination.requested
        assert not termination.agreed()
        os.kill(os.getpid(), number)
        assert termination.requested
        assert termination.agreed()
        assert termination.signal == number.name


def test_the_second_interrupt_is_at_once():
    with Termination() as termination:
        signal.raise_signal(signal.SIGINT)
        assert termination.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_signals_are_noted_again_and_again():
    """A supervisor that repeats itself is not a user who is in a hurry."""
    with Termination() as termination:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)
        assert termination.signal == "SIGTERM"


def test_one_process_of_a_group_agrees_with_itself_whatever_the_default_device():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"), Termination() as termination:
            assert not termination.agreed()
            signal.raise_signal(signal.SIGUSR1)
            assert termination.agreed()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("error", [None, ValueError])
def test_handlers_are_restored(error):
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with Termination():
            assert signal.getsignal(signal.SIGTERM) not in before
            if error:
                raise error
    except ValueError:
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_it_nests():
    with Termination() as outer:
        with Termination() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert (inner.requested, outer.requested) == (True, False)
        signal.raise_signal(signal.SIGTERM)
        assert outer.requested


def test_refuses_another_thread():
    caught = []

    def enter():
        try:
            with Termination():
                pass
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter, name="worker")
    thread.start()
    thread.join()
    assert caught == ["Termination: expected the main thread, got 'worker'"]
