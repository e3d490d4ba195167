"""Errors of the command line's parser: the option, what it expects, what came."""

import pytest
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--training.batch", "--training.batch: expected a value, got none"),
        ("--training.batch x", "--training.batch: expected a whole number, got 'x'"),
        ("--data.turns 1.5", "--data.turns: expected a whole number, got '1.5'"),
        ("--objective.kl-coef x", "--objective.kl-coef: expected a number, got 'x'"),
        ("--rewards.success x", "--rewards.success: expected a number or None, got 'x'"),
        ("--model.dtype fp8", "--model.dtype: expected one of bfloat16, float32, got 'fp8'"),
        ("--model.quantize 4", "--model.quantize: expected one of none, int8, nf4, got '4'"),
        ("--training.batch 1 2", "--training.batch 1: expected no further value, got '2'"),
        (
            "--data.turns 2 --model.checkpointing maybe",
            "--model.checkpointing: expected no further value, got 'maybe'",
        ),
        ("--rewards.extra-body {", "--rewards.extra-body: expected a JSON object, got '{'"),
        (
            "--rewards.weights a 1",
            "--rewards.weights: expected its entries one by one, as --rewards.weights.NAME VALUE",
        ),
        ("--training.lr 1", "Unrecognized options: --training.lr, 1; perhaps --training.learn"),
        (
            "--objective.clip-low 0.1",
            "--objective.clip-low: expected an option of nft, got one of grpo, guard, awm; nft has "
            "--objective.NAME for renoise.distribution, ",
        ),
        (
            "--teacher.path x",
            "--teacher.path: expected an option of the trainer, got one of "
            "examples/self_distillation.py",
        ),
        ("--gpus 6", "--gpus: expected an option of the trainer, got one of the launcher; give"),
        ("nft", "options: expected --NAME VALUE, got 'nft'"),
        (
            "training.batch 2",
            "options: expected --NAME VALUE, got 'training.batch'; perhaps --training.batch",
        ),
    ],
)
def test_an_error_names_the_option_the_expectation_and_the_value(words, expected):
    with pytest.raises(ConfigError) as refused:
        parse(["kontext-nft", *words.split()], services=False)
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)


def test_a_name_that_no_file_can_have_is_refused_as_the_options_value():
    with pytest.raises(ConfigError, match=r"^output\.resume: expected auto, best, never or"):
        parse(["kontext-nft", "--output.resume", "/" + "x" * 300], services=False)
