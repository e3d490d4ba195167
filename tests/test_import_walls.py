"""What each part of the package imports: third-party packages of the extras, by import statement.

One interpreter imports torch, then forks for each set of packages: statements that may import the
same ones run one after another there, for together they may import no more than each alone. A set
that has another one within it forks from that one's process: what is imported there, it may import.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
# Import names of what the extras install. tqdm is left out: torch imports it where it is installed.
EXTRAS = {
    "PIL", "accelerate", "anyio", "deepspeed", "diffusers", "fastapi", "httpx2", "hypothesis",
    "matplotlib", "onnxruntime", "peft", "pydantic", "rapidocr", "rich", "tenacity", "tensorboard",
    "transformers", "typer", "tyro", "uvicorn",
}  # fmt: skip
CHAINS = {"PIL", "pydantic"}
HTTP = {"anyio", "httpx2", "pydantic", "tenacity"}
SERVER = CHAINS | HTTP | {"fastapi", "rich", "typer", "uvicorn"}
DIFFUSERS = {"PIL", "accelerate", "anyio", "diffusers", "httpx2", "peft", "transformers"}
MODELS = {"PIL", "accelerate", "anyio", "httpx2", "transformers"}
# Statement to the packages of EXTRAS that it may import.
WALLS: dict[str, set[str]] = {
    "import mteditflow": set(),
    "import mteditflow.losses.nft": set(),
    "import mteditflow.flow.solvers": set(),
    "import mteditflow.drift": set(),
    "import mteditflow.chains": CHAINS,
    "import mteditflow.rewards": set(),
    "import mteditflow.rewards.faults": set(),
    "import mteditflow.rewards.scores": set(),
    "from mteditflow.rewards import Fault, InvalidRewardsError, Lost, TurnScores": set(),
    "from mteditflow.rewards import AnswerError, Features, RequestOptions": set(),
    "from mteditflow.rewards import Consistency, ConsistencyScorer, Pair, pairs_of": CHAINS,
    "from mteditflow.rewards import Background": {"anyio"},
    "from mteditflow.rewards import ChatClient, Dispatcher, JudgePrompt": HTTP,
    "from mteditflow.rewards import ConsistencyClient, Judge": CHAINS | HTTP,
    "import mteditflow.rewards.judge.answers": set(),
    "import mteditflow.rewards.judge.wording": set(),
    "import mteditflow.rewards.images": {"PIL"},
    "from mteditflow.rewards import DinoV3, GroundingDino": MODELS,
    "import mteditflow.rewards.server": SERVER,
    "import mteditflow.objectives": set(),
    "import mteditflow.pipelines": DIFFUSERS,
    "import mteditflow.planner": CHAINS | HTTP,
    "import mteditflow.evaluation": set(),
    "import mteditflow.evaluation.seeds": set(),
    "from mteditflow.evaluation import Evaluation, Report, compare": CHAINS,
    "from mteditflow.evaluation import draw_report": CHAINS | {"matplotlib"},
    "from mteditflow.evaluation import PickScore, Preference": CHAINS | HTTP | MODELS,
    "from mteditflow.evaluation import EditScoreScorer, TextScorer": CHAINS | HTTP,
    "from mteditflow.evaluation import RapidOcr": {"PIL", "onnxruntime", "rapidocr"},
    "import mteditflow.evaluation.benchmarks": CHAINS | HTTP,
    "import mteditflow.training": set(),
    "from mteditflow.training import Checkpoints, RewardWatch, Stopwatch, Updater": set(),
    "from mteditflow.training import Bar, RunLog, Termination, read_metrics": set(),
    "from mteditflow.training import most_parts, shard_model, sum_gradients": set(),
    "from mteditflow.training import partition_model": set(),
    "from mteditflow.training import load_optimizer_state, optimizer_state": set(),
    "from mteditflow.training import Aggregation, RoundRewards, gather_scores": CHAINS,
    "from mteditflow.training import print_summary, run_report, write_report": CHAINS | {"rich"},
    "import mteditflow.training.pictures": CHAINS | {"matplotlib"},
    "import mteditflow.budget": set(),
    "from mteditflow.budget import Budget, Plan, costs_of, count_passes, find_model": set(),
    "from mteditflow.budget import simulate": DIFFUSERS,
    "import mteditflow.cli": set(),
    "import mteditflow.testing": set(),
    "from mteditflow.testing import Law, check_group_advantage, reward_batches": {"hypothesis"},
    "import mteditflow_examples.flux.command_line": {"pydantic", "rich", "tyro"},
}
WITHOUT_HTTP = "import sys; sys.modules['httpx2'] = None; from mteditflow.rewards import "
PROBE = """
import json, os, sys
import einops, numpy, safetensors.torch, torch

def branch(statements, branches):
    if child := os.fork():
        os.waitpid(child, 0)
        return
    for statement in statements:
        error = None
        try:
            exec(statement, {})
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}"
        roots = {name.partition(".")[0] for name, x in sys.modules.items() if x is not None}
        print(json.dumps([statement, [sorted(roots), error]]), flush=True)
    for each in branches:
        branch(*each)
    os._exit(0)

for each in json.loads(sys.stdin.read()):
    branch(*each)
"""


def branches_of(together, root=None):
    """Sets of packages as a tree, each below the largest set within it; transformers takes long."""

    def below(packages):
        within = [other for other in together if other < packages]
        return max(within, key=lambda x: ("transformers" in x, len(x), sorted(x)), default=None)

    return [
        (statements, branches_of(together, packages))
        for packages, statements in together.items()
        if below(packages) == root
    ]


@pytest.fixture(scope="module")
def imported():
    """Statement to the roots of sys.modules after it, and to its error."""
    together: dict[frozenset[str], list[str]] = {}
    for statement, packages in WALLS.items():
        together.setdefault(frozenset(packages), []).append(statement)
    alone = [([f"{WITHOUT_HTTP}{name}"], []) for name in ("Judge", "TurnScores")]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        input=json.dumps([*branches_of(together), *alone]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return dict(map(json.loads, finished.stdout.splitlines()))


@pytest.mark.parametrize("statement", WALLS)
def test_a_statement_imports_no_more_than_it_may(imported, statement):
    roots, error = imported[statement]
    assert error is None
    assert "torch" in roots
    assert EXTRAS & set(roots) <= WALLS[statement]


def test_the_page_lists_what_each_wing_needs():
    """Rows of docs/architecture.md: a statement, and the packages that it imports."""
    rows = re.findall(r"^\| `([^`]*import [^`]*)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    shown = {statement: set(re.findall(r"`(\w+)`", needs)) for statement, needs in rows}
    assert shown == {statement: WALLS[statement] for statement in shown}
    folders = (file.parent.name for file in (ROOT / "mteditflow").glob("*/__init__.py"))
    packages = {"mteditflow", *(f"mteditflow.{name}" for name in folders)}
    named = {name for statement in shown for name in re.findall(r"mteditflow(?:\.\w+)?", statement)}
    core = {f"mteditflow.{name}" for name in ("advantages", "flow", "losses", "metrics")}
    assert packages - named <= core  # their names are those of mteditflow itself


def test_a_missing_package_is_named_with_its_extra_and_scores_do_not_need_it(imported):
    assert imported[f"{WITHOUT_HTTP}TurnScores"][1] is None
    assert imported[f"{WITHOUT_HTTP}Judge"][1] == (
        "ImportError: mteditflow.rewards.Judge needs httpx2: pip install 'mteditflow[rewards]'"
    )
