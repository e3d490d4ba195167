"""The example with the core alone: short, and it learns."""

import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "toy_2d.py"


def test_is_short_and_needs_the_core_alone():
    source = SCRIPT.read_text()
    assert len(source.splitlines()) < 80
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.MULTILINE))
    assert imported == {"copy", "matplotlib", "torch", "mteditflow"}


@pytest.mark.slow
def test_both_objectives_learn_and_the_picture_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    plt.close("all")
    said = capsys.readouterr().out
    shares = {name: int(share) for name, share in re.findall(r"(\w+): +(\d+)%", said)}
    assert list(shares) == ["before", "GRPO", "NFT"]
    # Three of eight modes are rewarded.
    assert 20 <= shares["before"] <= 45
    assert shares["GRPO"] >= 85
    assert shares["NFT"] >= 85
    assert (tmp_path / "toy_2d.png").read_bytes().startswith(b"\x89PNG")
