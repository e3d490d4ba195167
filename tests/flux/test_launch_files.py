"""Launch files: their options exist, and a dry run starts the ranks that they name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import accelerate.commands.launch
import mteditflow_examples.flux
import pytest
import torch.distributed.run
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError, Model
from mteditflow_examples.flux.sharding import LAUNCHED, Sharding, sharding

from mteditflow.training import parallel
from tests.flux.test_ranks_of_a_run import needs_zero
from tests.loops import some

LAUNCH = Path(mteditflow_examples.flux.__path__[0]) / "launch"
PRESET = ("shapes-nft", "--training.rounds", "3", "--data.chains", "two words.jsonl")


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    """No variables of a launcher."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)


def launched(monkeypatch, file, *more):
    """Arguments that accelerate launch gives to torchrun, in the environment that it gives."""
    given = []
    monkeypatch.setattr(
        torch.distributed.run, "run", lambda args: given.append((args, dict(os.environ)))
    )
    parser = accelerate.commands.launch.launch_command_parser()
    words = ["--config_file", str(LAUNCH / file), *more, "examples/train_flux.py", *PRESET]
    accelerate.commands.launch.launch_command(parser.parse_args(words))
    ((args, environment),) = given
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    return args


@pytest.mark.parametrize("file", [path.name for path in LAUNCH.glob("*.yaml")])
def test_accelerate_knows_every_option_of_a_file(file):
    values = yaml.safe_load((LAUNCH / file).read_text())
    config = ClusterConfig.from_yaml_file(str(LAUNCH / file))  # refuses unknown keys
    assert config.num_processes == values["num_processes"] == 8 * values["num_machines"]
    known = {
        option.lstrip("-")
        for action in accelerate.commands.launch.launch_command_parser()._actions
        for option in action.option_strings
    }
    inner = {**values.get("fsdp_config", {}), **values.get("deepspeed_config", {})}
    assert inner.keys() <= known


@pytest.mark.parametrize(
    ("file", "how", "machines"),
    [
        ("ddp.yaml", "none", "1:1"),
        ("fsdp2.yaml", "fsdp2", "1:1"),
        pytest.param("zero3.yaml", "zero3", "1:1", marks=needs_zero),
        ("two_nodes.yaml", "none", "2"),
    ],
)
def test_a_dry_run_of_accelerate_starts_the_ranks(monkeypatch, file, how, machines):
    more = ("--machine_rank", "1") if machines == "2" else ()
    args = launched(monkeypatch, file, *more)
    assert (args.nproc_per_node, args.nnodes) == ("8", machines)
    assert args.training_script == "examples/train_flux.py"
    assert parse(args.training_script_args) == parse(PRESET)
    assert sharding(Model(), ranks=8).how == how


@needs_zero
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--zero_stage", "2"],
            r"zero_stage: expected 3, got 2; .* at most 3 GiB .* private copies",
        ),
        (["--zero3_init_flag", "true"], "zero3_init_flag: expected false, got true"),
        (["--offload_optimizer_device", "cpu"], "offload_optimizer_device: expected none"),
        (["--gradient_clipping", "1.0"], "gradient_clipping: expected none of DeepSpeed's, got 1"),
        (["--gradient_accumulation_steps", "4"], "gradient_accumulation_steps: expected none of"),
    ],
)
def test_what_deepspeed_would_do_beside_partitioning_is_refused(monkeypatch, words, message):
    launched(monkeypatch, "zero3.yaml", *words)
    with pytest.raises(ConfigError, match=f"^{message}"):
        sharding(Model(), ranks=2)


@needs_zero
def test_offloading_of_parameters_and_a_configuration_of_deepspeed_are_passed_on(
    monkeypatch, tmp_path
):
    launched(monkeypatch, "zero3.yaml", "--offload_param_device", "cpu")
    assert sharding(Model(), ranks=2).zero["offload_param"]["device"] == "cpu"
    zero = {"stage": 3, "stage3_max_live_parameters": 7, "reduce_bucket_size": "auto"}
    file = tmp_path / "zero.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    monkeypatch.delenv("ACCELERATE_CONFIG_DS_FIELDS")  # of a launch file without other fields
    file.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": False}}))
    found = sharding(Model(), ranks=2)
    assert found.zero["stage3_max_live_parameters"] == 7
    assert "reduce_bucket_size" not in found.zero
    file.write_text(json.dumps({"zero_optimization": zero, "optimizer": {"type": "AdamW"}}))
    with pytest.raises(
        ConfigError, match=r"^optimizer: expected none of DeepSpeed's, got \{'type'"
    ):
        sharding(Model(), ranks=2)


@pytest.mark.parametrize(
    ("shard", "by_launch", "ranks", "message"),
    [
        ("fsdp2", None, 1, "model.shard: expected none in one process, got fsdp2; start several"),
        ("zero3", None, 1, "model.shard: expected none in one process, got zero3; start several"),
        ("fsdp2", "zero3", 2, "model.shard: expected none or zero3, which accelerate was launched"),
        ("zero3", "fsdp2", 2, "model.shard: expected none or fsdp2, which accelerate was launched"),
    ],
)
def test_what_does_not_go_together_is_refused(monkeypatch, shard, by_launch, ranks, message):
    for name, how in LAUNCHED.items():
        monkeypatch.setenv(name, str(how == by_launch).lower())
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        sharding(Model(shard=shard), ranks=ranks)


def test_zero3_needs_deepspeed_and_blocks_that_are_not_compiled(monkeypatch):
    monkeypatch.setattr(parallel, "version", lambda name: "0.19.0")
    with pytest.raises(ConfigError, match=r"^model\.shard: zero3: deepspeed: expected 0\.19\.8 or"):
        sharding(Model(shard="zero3"), ranks=2)
    monkeypatch.setattr(parallel, "version", lambda name: "0.19.8")
    with pytest.raises(ConfigError, match=r"^model\.compile: expected False under zero3"):
        sharding(Model(shard="zero3", compile=True), ranks=2)
    assert sharding(Model(shard="zero3"), ranks=2) == Sharding("zero3")


# Shell scripts: programs that print what they were started with stand in for a cluster's.


@pytest.fixture
def started(tmp_path):
    """Run a script; the processes that it starts, each as a dictionary."""
    shown = 'import json, os, sys; print(json.dumps({"words": sys.argv[1:], **os.environ}))'
    programs = {
        "scontrol": 'echo "first second" | tr " " "\\n"',
        "python": f"exec {sys.executable} -S -c '{shown}' \"$@\"",
        "torchrun": f"exec {sys.executable} -S -c '{shown}' \"$@\"",
        "srun": 'shift 2; for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@"; done',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def run(file, *words, **environment):
        path = f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
        done = subprocess.run(
            ["bash", str(LAUNCH / file), *words],
            env={"PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize("file", [path.name for path in LAUNCH.glob("*.sh")])
def test_bash_parses_a_script(file):
    done = subprocess.run(["bash", "-n", str(LAUNCH / file)], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.access(LAUNCH / file, os.X_OK)


def test_slurm_starts_one_rank_per_task(started):
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "8"}
    done, ranks = started("slurm.sh", *PRESET, **job)
    assert done.returncode == 0, done.stderr
    assert [(x["RANK"], x["LOCAL_RANK"]) for x in ranks] == [
        ("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")
    ]  # fmt: skip
    for rank in some(ranks):
        assert (rank["MASTER_ADDR"], rank["MASTER_PORT"], rank["WORLD_SIZE"]) == (
            "first", "29500", "4"
        )  # fmt: skip
        assert rank["words"][0] == "examples/train_flux.py"
        assert parse(rank["words"][1:]) == parse(PRESET)
    text = (LAUNCH / "slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"] == "USR1@300"  # of every task, without the batch shell


def test_torchrun_on_two_machines(started):
    done, (agent,) = started("two_nodes.sh", "1", "10.0.0.1", *PRESET, GPUS="4")
    assert done.returncode == 0, done.stderr
    args = torch.distributed.run.get_args_parser().parse_args(agent["words"])
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "4", 1)
    assert (args.master_addr, args.master_port) == ("10.0.0.1", 29500)
    assert args.training_script == "examples/train_flux.py"
    assert parse(args.training_script_args) == parse(PRESET)
    done, nothing = started("two_nodes.sh", "1")
    assert (done.returncode, nothing) == (2, [])
    assert done.stderr.startswith("error: expected the machine's number")
