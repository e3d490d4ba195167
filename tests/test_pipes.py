"""Standard output whose reader leaves, as ``| head -1`` does, ends nothing with an error."""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from mteditflow_examples.flux.command_line import parse_or_exit
from rich.console import Console

from mteditflow import cli
from mteditflow._pipes import reader_may_leave
from mteditflow.chains import __main__ as commands
from mteditflow.training import print_summary, run_report
from tests.samples_of_scores import evaluation


@pytest.fixture
def unread():
    """A pipe whose reader has left, to be made standard output in a test."""
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    os.close(reader)
    yield redirect_stdout(stream)
    stream.close()  # what is left goes nowhere, so that it does not fail


def test_what_is_printed_goes_nowhere(unread):
    with unread:
        with reader_may_leave():
            sys.stdout.write("x" * 10**6)
            pytest.fail("it was written")
        with reader_may_leave():
            sys.stdout.write("more")


def test_what_is_in_the_buffer_too(unread):
    with unread:
        with reader_may_leave():
            sys.stdout.write("a line\n")
        sys.stdout.write("another")
        sys.stdout.flush()


def test_a_console_that_ends_the_program_does_not(unread):
    with unread, reader_may_leave():
        Console().print("a line")


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_program_that_ends_itself_ends_as_it_wants_to(unread, code):
    def program():
        with unread, reader_may_leave():
            sys.stdout.write("a line\n")
            sys.exit(code)

    with pytest.raises(SystemExit) as ended:
        program()
    assert ended.value.code == code


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_for_nobody(unread, words):
    with pytest.raises(SystemExit) as ended, unread:
        cli.main(words)
    assert ended.value.code == 0


def test_a_full_disk_under_standard_output_takes_one_line(capsys):
    with Path("/dev/full").open("w") as full:
        with pytest.raises(SystemExit) as ended, redirect_stdout(full), reader_may_leave():
            Console().print("a line")
        full.flush()  # what was left to print is gone
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


def test_other_errors_are_raised():
    with pytest.raises(OSError, match="disk"), reader_may_leave():
        raise OSError("disk")


def test_a_finished_run_is_summarized_for_nobody(unread, tmp_path):
    same = evaluation([[1, 0]])
    with unread:
        print_summary(run_report(same, same, [], config={}, seed=0), tmp_path)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["--help"], 0),
        (["kontext-nft", "--help"], 0),
        (["kontext-nft", "--help", "objective"], 0),
    ],
)
def test_help_of_the_trainer_ends_the_program(unread, words, code):
    with pytest.raises(SystemExit) as ended, unread:
        parse_or_exit(words)
    assert ended.value.code == code


def test_a_command_ends_with_0(unread, monkeypatch):
    monkeypatch.setattr(commands, "out", Console())  # which is quiet from then on
    with pytest.raises(SystemExit) as ended, unread:
        commands.app(["formats"], prog_name="chains")
    assert ended.value.code == 0
