"""docs/migrating.md: names and defaults of ours exist, conversions are tested, its code runs."""

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from mteditflow_examples.flux.config import Config
from mteditflow_examples.flux.config_values import field_names
from mteditflow_examples.flux.spelling import USUAL

import mteditflow as mt
from mteditflow import objectives
from mteditflow.objectives import OBJECTIVES
from tests.loops import some
from tests.test_migrating import (
    GROUP,
    NEXT,
    SIGMA,
    G,
    column,
    flow_sde,
    mean,
    normal_log_density,
    peer_advantage,
    peer_clipped,
    rewards,
    same,
    tensors,
)

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
PEERS = {"convention", "theirs", "flow_grpo, DiffusionNFT", "Flow-Factory", "TRL GRPO; DDPO"}
# Names of the peers that stand in the text alone.
TEXT_ALONE = {"adv_mode", "compute_advantages", "delta", "group", "sample_eta", "sde_window_range"}
TEXT_ALONE |= {"per_prompt_stat_tracking_buffer_size", "train.cfg"}


def rows_of(first):
    """Rows of the table whose first column has this title: cells by title."""
    for block in some(re.findall(r"(?:^\|.*\n)+", PAGE, re.M)):
        cells = [
            [x.strip() for x in line.strip("|\n ").split(" | ")] for line in block.splitlines()
        ]
        if cells[0][0] == first:
            return [dict(zip(cells[0], row, strict=True)) for row in some(cells[2:])]
    raise AssertionError(f"no table that begins with {first}")


def all_rows():
    return [*rows_of("mteditflow"), *rows_of("convention")]


def codes(text):
    return re.findall(r"`([^`]+)`", text)


@cache
def public():
    modules = (objectives, mt)
    return {name: getattr(module, name) for module in modules for name in module.__all__}


@cache
def options():
    configs = [Config(objective=x()) for x in OBJECTIVES.values() if x.card.rewarded]
    return {name for config in configs for name in field_names(config)}


def arguments(function):
    return {*inspect.signature(function).parameters}


@cache
def all_arguments():
    functions = [x for x in public().values() if inspect.isfunction(x)]
    return set.union(*map(arguments, functions))


def is_ours(code):
    """A public name, an option, an argument, or a call of a name with arguments that it has."""
    if "(" not in code:
        return code in public() or code in options() or code in all_arguments()
    call = ast.parse(code, mode="eval").body
    function = public().get(ast.unparse(call.func))
    return function is not None and {x.arg for x in call.keywords} <= arguments(function)


def test_names_in_our_columns_are_ours():
    ours = [code for row in all_rows() for code in codes(row["mteditflow"])]
    assert len(ours) > 60
    assert [x for x in ours if not is_ours(x)] == []


def test_the_text_names_nothing_else():
    theirs = {x for row in all_rows() for title in PEERS & row.keys() for x in codes(row[title])}
    text = re.sub(r"^```python\n.*?^```$", "", PAGE, flags=re.M | re.S)
    text = re.sub(r"^\|.*$", "", text, flags=re.M)
    named = [x for x in codes(text) if not x.startswith("tests/")]
    assert len(named) > 20
    assert [x for x in named if not (is_ours(x) or x in theirs | TEXT_ALONE)] == []


@pytest.mark.parametrize(
    "wrong", ["gaussian_kl(mode=1)", "group_advantages", "training.lr", "nothing()"]
)
def test_a_wrong_name_is_noticed(wrong):
    assert not is_ours(wrong)


def test_defaults_of_ours_are_those_of_the_page():
    stated = 0
    for row in some(rows_of("mteditflow")):
        names, _, value = row["mteditflow"].partition(" = ")
        for name in some(codes(names)):
            for default in some(defaults(name)):
                if value:
                    stated += 1
                    assert default == (value if isinstance(default, str) else float(value))
    assert stated > 40


def defaults(option):
    """Defaults of an option, one for each objective that has it."""
    for kind in (x for x in OBJECTIVES.values() if x.card.rewarded):
        value = Config(objective=kind())
        if option in field_names(value):
            for part in option.split("."):
                value = getattr(value, part)
            yield value


def test_hints_of_the_command_line_agree_with_the_table():
    fields = {}
    for row in some(rows_of("mteditflow")):
        for name in {x for title in PEERS & row.keys() for x in codes(row[title])} & USUAL.keys():
            fields.setdefault(name, []).extend(codes(row["mteditflow"]))
    assert len(fields) > 20
    assert [name for name, ours in fields.items() if USUAL[name] not in ours] == []


def test_every_conversion_has_its_test():
    named = {code for row in rows_of("convention") for code in codes(row["test"])}
    file = (ROOT / "tests" / "test_migrating.py").read_text(encoding="utf-8")
    assert named == set(re.findall(r"^def (test_\w+)", file, re.M))
    assert len(named) > 20


# The first hour


def run(number, **names):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len(blocks) == 4
    exec(compile(blocks[number], f"block {number}", "exec"), names)
    return names


def test_first_hour_of_flow_grpo():
    x, v, noise, old_v = tensors(4)
    reward, *_ = rewards()
    center, std, _ = flow_sde(x, v, column(SIGMA), column(NEXT), 0.9)
    old = flow_sde(x, old_v, column(SIGMA), column(NEXT), 0.9)[0]
    drawn = old + std * noise
    log_prob, before = (mean(normal_log_density(drawn, c, std)) for c in (center, old))
    given = {"latents": x, "model_pred": v, "sigma": SIGMA, "sigma_prev": NEXT}
    found = run(0, rewards=reward, group=GROUP, next_latents=drawn, old_log_prob=before, **given)
    same(found["log_prob"], log_prob)
    advantage = peer_advantage(reward, over="batch", eps=1e-4).clamp(-5, 5)
    same(found["policy_loss"], peer_clipped(log_prob, before, advantage, 1e-4, 1e-4).mean())


def test_first_hour_of_diffusion_nft():
    x0, noise, v, old, reference = tensors(5)
    reward, t = rewards()[0], column(SIGMA)
    given = {"forward_prediction": v, "old_prediction": old, "noise": noise, "x0": x0, "t": t}
    found = run(1, rewards=reward, group=GROUP, ref_forward_prediction=reference, **given)
    advantage = peer_advantage(reward, over="batch", eps=1e-4)
    same(found["advantages"], advantage)
    errors = [t * (noise - x0 - u) for u in (v, 2 * old - v)]
    toward, away = (mean(e**2) / mean(e.abs()) for e in errors)
    r = advantage / 10 + 0.5
    theirs = (5 * (r * toward + (1 - r) * away)).mean()
    same(found["loss"], theirs + 1e-4 * ((v - reference) ** 2).mean())


def test_first_hour_of_flow_factory():
    x, center, old = tensors(3)
    parts, weights = dict(zip("ab", rewards(), strict=False)), {"a": 1.0, "b": 0.3}
    std = torch.full((6,), 0.4, dtype=torch.float64)
    given = {"next_latents": x, "mean": center, "old_mean": old, "scale_factor": std}
    found = run(2, rewards=parts, weights=weights, group=GROUP, **given)
    normed = sum(w * peer_advantage(parts[k], over="group") for k, w in weights.items())
    adv = (normed - normed.mean()) / normed.std(correction=0)
    log_prob, before = (mean(normal_log_density(x, c, column(std))) for c in (center, old))
    log_ratio = std * (log_prob - before) + mean((center - old) ** 2) / (2 * std)
    same(found["policy_loss"], peer_clipped(log_ratio, 0 * std, adv, 1e-4, 1e-4).mean())


def test_first_hour_of_trl():
    log_prob, old = tensors(2, (6, 5))
    v, reference, target = tensors(3)
    reward, mask = rewards()[0], torch.ones(6, 5, dtype=torch.bool)
    mask[0, 2:] = False
    given = {"velocity": v, "ref_velocity": reference, "target": target, "beta": 0.1}
    found = run(
        3,
        rewards=reward,
        num_generations=G,
        mask=mask,
        log_prob=log_prob,
        old_log_prob=old,
        **given,
    )
    advantage = peer_advantage(reward, over="group", eps=1e-4)[:, None]
    theirs = peer_clipped(log_prob, old, advantage, 0.2, 0.2)
    same(found["loss"], (theirs * mask).sum() / mask.sum())
    better = mean((reference - target) ** 2) - mean((v - target) ** 2)
    best, worst = (
        (3 * k + reward[3 * k :][:3].argmax() for k in (0, 1)),
        (3 * k + reward[3 * k :][:3].argmin() for k in (0, 1)),
    )
    margins = torch.stack([better[b] - better[w] for b, w in zip(best, worst, strict=True)])
    same(found["dpo"], torch.nn.functional.softplus(-0.1 * margins).mean())
