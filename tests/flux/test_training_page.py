"""The page that leads to a running job: its commands parse, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest
from mteditflow_examples.flux.config import PRESETS, parse

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
COMMANDS = re.findall(r"examples/train_flux\.py ((?:[^\n`]|\\\n)+)", PAGE.replace("\\\n", " "))


def test_there_is_a_command_to_launch():
    assert len(COMMANDS) >= 1


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    config = parse(shlex.split(command))
    assert config.rewards.judge


def test_options_and_presets_exist(capsys):
    with pytest.raises(SystemExit):
        parse(["kontext-nft", "--help"])
    known = capsys.readouterr().out
    named = set(
        re.findall(
            r"--((?:model|data|sampling|grpo|nft|rewards|training|safety|evaluation|"
            r"output)\.[a-z.-]+)",
            PAGE,
        )
    )
    assert len(named) > 15
    for option in named:
        assert f"--{option}" in known, option
    for preset in re.findall(r"^\| `([a-z-]+)`", PAGE, flags=re.MULTILINE):
        assert (PRESETS / f"{preset}.toml").exists() or "/" in preset, preset


def test_links_and_launch_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for file in re.findall(r"launch/[a-z0-9_]+\.yaml", PAGE):
        assert (ROOT / "examples" / "flux" / file).exists(), file
