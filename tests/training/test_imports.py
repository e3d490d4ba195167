"""The package and its core pieces import where only torch and safetensors are installed."""

import json
import subprocess
import sys

import pytest

import mteditflow.training

HEAVY = [
    "PIL", "accelerate", "diffusers", "matplotlib", "peft", "pydantic", "rich", "tensorboard",
    "tqdm", "transformers",
]  # fmt: skip
WITH_OTHERS = {
    "Bar",
    "RunLog",
    "gather_scores",
    "print_summary",
    "run_report",
    "summary_text",
    "write_report",
}
BLOCK = f"""
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
"""


def printed(program):
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def found():
    """For each name of the package, nothing or the message of its import error."""
    return printed(
        BLOCK
        + """
import mteditflow.evaluation
import mteditflow.training as package
found = {}
for name in package.__all__:
    try:
        getattr(package, name)
        found[name] = ""
    except ImportError as error:
        found[name] = str(error)
print(json.dumps(found))
"""
    )


def test_each_piece_imports_with_torch_and_safetensors(found):
    names = set(mteditflow.training.__all__) - WITH_OTHERS
    assert {name: found[name] for name in names} == dict.fromkeys(names, "")


def test_a_missing_package_is_named_with_the_extra_to_install(found):
    message = "mteditflow.training.RunLog needs tqdm: pip install 'mteditflow[train]'"
    assert found["RunLog"] == message


def test_no_name_is_hidden_by_a_module_of_the_package():
    """Importing a module of a lazy name's spelling would put the module in the name's place."""
    modules = printed(
        """
import json
import mteditflow.training as package
import mteditflow.training.report
kinds = {name: type(getattr(package, name)).__name__ for name in package.__all__}
print(json.dumps([name for name, kind in kinds.items() if kind == "module"]))
"""
    )
    assert modules == []
