"""Examples and benchmarks import public names: those in the ``__all__`` of a package."""

import ast
import importlib
from functools import cache
from pathlib import Path

import pytest

from tests.loops import some

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file.relative_to(ROOT).as_posix()
    for folder in ("examples", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)
# Module to the names of it that may be imported although no package names them in __all__.
ALLOWED: dict[str, set[str]] = {
    # The atomic writes of the repository; they are no part of reinforcement learning.
    "mteditflow._files": {
        "naming",
        "require_folder",
        "require_no_device",
        "write_all_atomically",
        "write_atomically",
    },
    # Why a model of the hub cannot be read.
    "mteditflow._hub": {"HubError", "explaining_hub"},
    "mteditflow._locks": {"sole_writer"},
    "mteditflow._pipes": {"reader_may_leave"},
    # Foreign text on a terminal, and the options of every command with a judge.
    "mteditflow._command": {"OneLineCommand", "OneLineGroup", "program", "writing"},
    "mteditflow._exits": {
        "BAD_INPUT",
        "FAILED",
        "failing",
        "naming_argument",
        "refuse",
        "refusing",
    },
    "mteditflow._checks": {"check_count"},
    "mteditflow._spelling": {"perhaps"},
    "mteditflow._text": {"escape_controls", "escape_markup", "parse_json"},
    # The end of a program whose scorer blocks.
    "mteditflow.rewards.transport.concurrency": {"ending_past_calls"},
    "mteditflow.rewards.command_line": {
        "AnswerTokens",
        "ChatTemplateKwargs",
        "ExtraBody",
        "QUESTION",
        "ReasoningTokens",
        "check_source",
        "read_secret",
        "request_options",
        "require_or_answers",
        "require_reachable",
    },
    # Whether a folder holds a pipeline that can be trained, before it is loaded.
    "mteditflow.pipelines.families": {"find_family"},
    "mteditflow.pipelines.quantization": {"QUANTIZATIONS", "check_quantization", "quantize"},
    # Intervals where all chains are alike, ranges of scores, and what a scorer is checked with.
    "mteditflow.evaluation.intervals": {"bounded_interval", "interval_of", "overall_interval"},
    "mteditflow.rewards.scale": {"COSINE", "SHARE"},
    "mteditflow.evaluation.evaluation": {"FOLLOWING", "check_consistency"},
    "mteditflow.evaluation.code_version": {"code_version"},
    "mteditflow.evaluation.figures": {"chart_files"},
    # What records of judges and makers are made and compared with.
    "mteditflow.evaluation.provenance": {
        "agreed",
        "content_hash",
        "prompt_version",
        "require_same_judge",
        "same_judge",
        "version_of",
    },
    # Modules that are imported as a whole: the forms of one report, and statistics over seeds.
    "mteditflow.evaluation.gallery": {"Series", "gallery"},
    "mteditflow.evaluation.seeds": {
        "SeedInterval",
        "difference_interval",
        "mean_interval",
        "percentile_ends",
        "resampled_means",
        "setting_errors",
    },
    "mteditflow.evaluation.tables": {
        "as_csv",
        "checks_in_short",
        "denominators",
        "judges",
        "lost_in_short",
        "markdown",
        "rich_tables",
    },
    # Fields of a public report, and the choices of an option.
    "mteditflow.evaluation.benchmarks.averages": {"Group"},
    "mteditflow.evaluation.benchmarks.edival": {"SINGLE_QUESTION", "questions_version"},
    "mteditflow.evaluation.benchmarks.gedit": {"CONSISTENCY", "LANGUAGES", "QUALITY"},
    "mteditflow.evaluation.benchmarks.imgedit": {"rubrics_of"},
    # Questions of the protocols of sessions, whose wording a report hashes, and their constants.
    "mteditflow.evaluation.benchmarks.lme": {"damage_request", "following_request"},
    "mteditflow.evaluation.benchmarks.mice": {
        "TEMPERATURE",
        "VOTES",
        "awareness_request",
        "require_fields",
    },
    "mteditflow.evaluation.benchmarks.mse": {"ENOUGH", "mse_request"},
    "mteditflow.evaluation.benchmarks.sessions": {"Measured"},
    # How few cases are few, what is no image, and the first words of a long error.
    "mteditflow.metrics": {"FEW_CASES"},
    "mteditflow._images": {"BOMBS", "UNREADABLE", "check_image", "read_image"},
    "mteditflow.chains.record": {"first_error"},
    # Whether a name in a file of others leads out of a folder.
    "mteditflow.chains.files": {"is_outside"},
    # Whether a folder is a data set.
    "mteditflow.chains.formats.stored": {"is_stored"},
    # Column prefix of metrics.jsonl, and the packages whose versions a report names.
    "mteditflow.training.metrics_file": {"SECONDS"},
    "mteditflow.training.report": {"PACKAGES"},
    # Whether a package can do what is asked, before a model is loaded.
    "mteditflow.training.parallel": {"require_deepspeed"},
    # Responses of a scripted server.
    "mteditflow.testing.endpoint": {"completion", "late"},
    # Benchmarks measure how conditioning is stored and how often blocks are compiled.
    "mteditflow.pipelines.conditioning": {"leaves", "map_leaves", "select_rows"},
    "mteditflow.pipelines.editor": {"COMPILATIONS"},
}


def imports(file: str) -> set[tuple[str, str]]:
    """Pairs of module and name in ``from mteditflow... import ...``; ``""`` for a plain import."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {(x.name, "") for x in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {(str(node.module), x.name) for x in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] == "mteditflow"}


@cache
def public(module: str) -> frozenset[str]:
    return frozenset(getattr(importlib.import_module(module), "__all__", ()))


@pytest.mark.parametrize("file", FILES)
def test_imports_are_public(file):
    hidden = {
        (module, name)
        for module, name in imports(file)
        if name not in ALLOWED.get(module, ())
        and (name not in public(module) if name else module != "mteditflow")
    }
    assert not hidden, (
        f"{file}: import these from the package whose __all__ names them, or explain them in "
        f"ALLOWED: {sorted(hidden)}"
    )


def test_exceptions_are_used_and_still_needed():
    used: dict[str, set[str]] = {}
    for file in FILES:
        for module, name in imports(file):
            used.setdefault(module, set()).add(name)
    for module, names in some(ALLOWED.items()):
        assert names <= used.get(module, set()), f"{module}: no example or benchmark imports these"
        assert not names & public(module), f"{module}: these are public by now"
