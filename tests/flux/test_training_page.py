"""The page that leads to a running job: its commands parse, and what it names exists."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from mteditflow_examples.flux.command_line import PRESETS, parse
from mteditflow_examples.flux.config import SERVED, DistillationConfig

from mteditflow.objectives import OBJECTIVES
from tests.flux.test_config import options_of
from tests.loops import some

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
COMMANDS = re.findall(r"examples/train_flux\.py ((?:[^\n`]|\\\n)+)", PAGE.replace("\\\n", " "))


def test_there_is_a_command_to_launch():
    assert len(COMMANDS) >= 1


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    config = parse(shlex.split(command))
    assert config.rewards.judge or config.rewards.scorer


def test_the_command_of_mt_opsd_is_understood():
    (command,) = re.findall(r"self_distillation\.py ([^\n]+)", PAGE.replace("\\\n", " "))
    assert parse(shlex.split(command), DistillationConfig).teacher.turns == (3, 2)


def test_options_and_presets_exist():
    config = DistillationConfig()
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    known = {option for name, x in sections.items() for option in options_of(f"--{name}", x)}
    for objective in OBJECTIVES.values():
        known |= set(options_of("--objective", objective()))
    known |= {f"--rewards.weights.{name}" for name in (*config.rewards.weights, *SERVED)}
    named = set(re.findall(r"--[a-z]+\.[a-z.-]+[a-z]", PAGE))
    assert len(named) > 30
    assert named <= known
    words = set(re.findall(r"objective:([a-z_]+)", PAGE))
    assert len(words) >= 6
    assert words <= set(OBJECTIVES)
    for preset in some(re.findall(r"^\| `(\S+-(?:nft|grpo))`", PAGE, flags=re.MULTILINE)):
        assert (PRESETS / f"{preset}.toml").exists() or "/" in preset, preset


def test_links_and_launch_files_exist():
    for target in some(re.findall(r"\]\(([^)#]+)\)", PAGE)):
        assert (ROOT / "docs" / target).exists(), target
    for file in some(re.findall(r"launch/[a-z0-9_]+\.[a-z]+", PAGE)):
        assert (ROOT / "examples" / "flux" / file).exists(), file
