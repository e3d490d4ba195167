"""Everything that a run can be told: dataclasses, presets as files, what is refused at start."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mteditflow import LagrangeMultiplier

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Model:
    """The editor, and how it is held and run."""

    path: str = "black-forest-labs/FLUX.1-Kontext-dev"
    """Hub id or folder of a FLUX.1-Kontext or FLUX.2-klein pipeline in diffusers format."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and arithmetic; adapters, log-probs and losses are float32 in either."""
    resolution: Count = 512
    """Side of all images, pixels; references are cropped to a square of it."""
    guidance: Annotated[float, Field(ge=1)] = 2.5
    """The pipeline's guidance_scale: embedded for Kontext, classifier-free for klein."""
    options: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Further arguments of the pipeline call; in preset files alone."""
    lora_rank: Count = 64
    """Rank of the adapters."""
    lora_alpha: Count = 128
    """Their scale is alpha / rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the modules that get adapters; none: attention and feed-forward of the family."""
    checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the repeated blocks with torch.compile: minutes at the start, faster after."""
    attention: str | None = None
    """Attention backend by diffusers' name, such as flash or sage; none: torch's own."""
    vae_slicing: bool = False
    """Decode images one by one: less memory."""
    vae_tiling: bool = False
    """Decode images tile by tile: less memory; results change a little."""
    shard: bool = False
    """Shard weights over all ranks (FSDP2), where one device cannot hold them; else replicate."""


@dataclass(frozen=True)
class Data:
    """Chains, and how many make a round."""

    chains: Path = Path("chains.jsonl")
    """Chains to train on, in any format of python -m mteditflow.chains formats."""
    held_out: Path | None = None
    """Chains to evaluate on, never trained; none: no evaluation."""
    turns: Count = 3
    """Turns N of every chain; longer chains are cut, shorter ones left out."""
    groups: Count = 8
    """Chains in a round, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Trajectories G of each chain: same reference and instructions, other noise."""
    split_groups: bool = False
    """Whether the trajectories of one chain may lie on several ranks."""
    draw: Literal["epochs", "teaching"] = "epochs"
    """Every chain once an epoch; or chains anew each round, more often those whose trajectories
    differed in how well they followed."""


@dataclass(frozen=True)
class Sampling:
    """How trajectories are rolled out."""

    steps: Count = 6
    """Denoising steps S of a turn."""
    batch: Count = 8
    """Trajectories sampled at once on a rank; no matter for the result but for rounding."""
    solver: Literal["flow", "dance", "cps"] = "flow"
    """Of objectives that replay: kind of stochastic step, Flow-SDE, Dance-SDE or
    coefficient-preserving."""
    noise_level: Positive = 0.9
    """Of objectives that replay: noise level a of the solver."""
    stochastic_steps: Count = 5
    """Of objectives that replay: steps of a turn that draw noise and are trained; the others are
    ODE steps."""
    window_interval: Natural = 0
    """Rounds until these steps move on by one (MixGRPO); 0: always the first ones."""


@dataclass(frozen=True)
class GRPO:
    """Objectives that replay stochastic steps: grpo, and its variants guard and dppo."""

    clip: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """grpo, guard: ratios of mean log-probs are clipped to 1 - clip and 1 + clip."""
    threshold: NonNegative = 1e-6
    """dppo: KL of a step to the old policy's, mean over elements, beyond which no step goes
    further."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL to the reference; above 0 it costs a forward pass."""
    share: PositiveShare = 1.0
    """Share of the stochastic steps that is trained, drawn anew for every turn."""


@dataclass(frozen=True)
class NFT:
    """Objectives that noise clean latents anew: nft, awm and dpo."""

    beta: Positive = 1.0
    """nft: mixing of current and old policy; small is bold. dpo: strength of the pull to the
    reference; 2000 is usual."""
    loss: Literal["adaptive", "plain"] = "adaptive"
    """nft: clean-space error divided by its size, or the plain velocity error."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """awm: ratios of matching losses are clipped to 1 - clip and 1 + clip."""
    old_kl_coef: NonNegative = 0.0
    """awm: weight of the velocity KL to the old policy."""
    noise_levels: Count = 1
    """Noise levels that each turn's clean latent is trained at in a round."""
    sigma_shift: Positive = 1.0
    """Noise levels are uniform, then shifted toward 1 by this factor."""
    kl_coef: NonNegative = 1e-4
    """Weight of the velocity KL to the reference; above 0 it costs a forward pass."""
    norm_coef: NonNegative = 0.0
    """Weight of the hinge on the velocity's norm above the reference's (NormGuard); above 0 it
    costs a forward pass."""
    old_slope: NonNegative = 0.001
    """The old policy keeps this share more of itself with every round; 0: always on-policy."""
    old_maximum: Share = 0.5
    """Up to this share."""


@dataclass(frozen=True)
class Distillation:
    """Of self_distillation.py alone, which trains on no reward and has no objective."""

    teacher: Path | None = None
    """Folder of a LoRA of the run's rank and modules, such as a checkpoint's lora; it sees what the
    student sees. None: the model as it came, which is shown clean images."""
    share: PositiveShare = 1.0
    """Share of the steps of every turn that is trained, drawn anew in every round."""


@dataclass(frozen=True)
class Rewards:
    """Who scores, and how scores become advantages."""

    judge: tuple[str, ...] = ()
    """URLs of the judge, ending in /v1: any OpenAI-compatible endpoints of one model."""
    judge_model: str = ""
    """Name that the judge is known by. Its key, if it wants one, is read from OPENAI_API_KEY."""
    scope: Literal["trajectory", "turn"] = "trajectory"
    """What one call of the judge is about."""
    scale: Literal["likert", "binary"] = "likert"
    """What it answers."""
    thinking: bool = True
    """Whether it writes an analysis before its scores."""
    answer_format: Literal["json", "text"] = "json"
    """text: for endpoints without structured output."""
    concurrency: Count = 64
    """Requests in flight to each service, from each rank."""
    timeout: Positive = 120.0
    """Seconds for an answer."""
    consistency: tuple[str, ...] = ()
    """URLs of mteditflow.rewards.server. Their token is read from MTEDITFLOW_TOKEN."""
    terms: Literal["features", "l1"] = "features"
    """What consistency compares."""
    pairing: Literal["reference", "consecutive"] = "reference"
    """Which image a turn's image is compared with."""
    scorer: str | None = None
    """module:name of a scorer of your own, in place of both services."""
    weights: dict[str, float] = field(
        default_factory=lambda: {"following": 1.0, "consistency": 0.15}
    )
    """Weight of each reward; one of weight 0 is reported only, if the scorer gives it."""
    aggregate: Literal["average", "successes", "all"] = "average"
    """How turns of "following" become one reward: their average score, the share of them that
    succeed, or 1 if all do."""
    credit: Literal["trajectory", "turn", "until_failure", "to_go", "mixture"] = "trajectory"
    """Who is credited: all turns with the reward of the whole chain; each turn with its own,
    normalised among the same turn of its group; so up to the first turn that fails, after which
    none takes part; each turn with the mean of its own and what came after it; or a mixture of the
    first two."""
    discount: Share = 1.0
    """Credit to_go: what a turn's reward counts for the turn before it; 0: credit turn."""
    trajectory_share: Share = 0.5
    """Credit mixture: share of the whole chain's signal beside the turn's own."""
    groups: Literal["all", "teaching"] = "all"
    """Which groups are trained on; teaching: not those in which all chains follow fully, none does
    at all, or all do equally well over their turns."""
    floor: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Smallest mean of consistency that is wanted: below it its weight grows round by round, by a
    Lagrange multiplier, and all weights are divided by 1 + multiplier; none: weights are fixed."""
    floor_rate: Positive = 5.0
    """What the multiplier gains in a round for each unit that consistency lies below the floor."""
    floor_maximum: Positive = 10.0
    """Largest multiplier."""
    fusion: Literal["advantages", "rewards"] = "advantages"
    """Normalise each reward in its group and add advantages up, or add rewards up first."""
    std: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the spread of the group, of the round, nothing."""
    advantage_max: Positive = 5.0
    """Advantages are clamped to this; NFT: where the optimality probability reaches 1."""
    success: NonNegative = 5.0
    """Score from which on a turn counts as followed: in evaluation, for aggregate successes and
    all, and for credit until_failure."""
    max_invalid: Share = 0.2
    """Share of a round's trajectories without a reward that stops the run."""

    @property
    def multiplier(self) -> LagrangeMultiplier | None:
        """Of consistency, as a run begins with it; None without a floor."""
        if self.floor is None:
            return None
        return LagrangeMultiplier(self.floor, self.floor_rate, self.floor_maximum)


@dataclass(frozen=True)
class Training:
    """The optimiser and the loop."""

    rounds: Count = 700
    """Rounds of sampling, scoring and updating."""
    minibatches: Count = 1
    """Optimiser steps in a round, each on another part of its trajectories."""
    batch: Count = 4
    """Rows (one step of one turn; dpo: pairs of them) in a forward and backward pass; no matter
    for the result."""
    learning_rate: Positive = 3e-4
    """Of AdamW."""
    final_rate: PositiveShare = 1.0
    """Share of the learning rate in the last round; it falls in a straight line."""
    weight_decay: NonNegative = 1e-4
    """Of AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: Share = 0.9
    """Share that the averaged policy keeps of itself; 0: there is none."""
    ema_every: Count = 8
    """Optimiser steps between its updates."""
    seed: Natural = 0
    """Of adapters, chains and noise."""


@dataclass(frozen=True)
class Safety:
    """When a run stops by itself."""

    ratio: Literal["stop", "warn"] = "stop"
    """GRPO: what to do if ratios on the first rollout are not 1."""
    ratio_share: Positive = 0.1
    """GRPO: deviation of a ratio that is allowed, as a share of clip."""
    collapse_drop: PositiveShare = 0.3
    """Relative fall of a reward below its best that stops the run; 1: never."""
    collapse_window: Count = 20
    """Rounds that are averaged for it."""
    max_skipped: Count = 5
    """Updates skipped one after the other, for losses that are not finite, that stop the run."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out chains, with the same noise every time."""

    every: Count = 50
    """Rounds between evaluations; also before the first and after the last."""
    steps: Count = 28
    """Denoising steps of a turn."""
    batch: Count = 8
    """Trajectories sampled at once on a rank."""
    policy: Literal["current", "old", "ema"] = "ema"
    """Which policy is evaluated."""


@dataclass(frozen=True)
class Output:
    """What a run leaves behind, and how often."""

    folder: Path = Path("runs/flux")
    """Where everything goes."""
    resume: str = "auto"
    """auto: the newest whole checkpoint in the folder, if any; never; or a checkpoint's path."""
    checkpoint_every: Count = 10
    """Rounds between checkpoints."""
    keep: Count = 3
    """Checkpoints kept: the last ones, and always the best."""
    strips_every: Natural = 10
    """Rounds between pictures of chains and histograms; 0: none."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of accelerate, such as tensorboard, wandb, trackio."""


@dataclass(frozen=True)
class Config:
    """Reinforcement learning of FLUX.1-Kontext or FLUX.2-klein on chains of edits."""

    __pydantic_config__ = STRICT

    objective: Literal["nft", "awm", "dpo", "grpo", "guard", "dppo"] = "nft"
    """DiffusionNFT, advantage-weighted matching, preference pairs; or, on stochastic steps,
    Flow-GRPO's clipped surrogate, GRPO-Guard, Flow-DPPO."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    sampling: Sampling = field(default_factory=Sampling)
    grpo: GRPO = field(default_factory=GRPO)
    nft: NFT = field(default_factory=NFT)
    distillation: Distillation = field(default_factory=Distillation)
    rewards: Rewards = field(default_factory=Rewards)
    training: Training = field(default_factory=Training)
    safety: Safety = field(default_factory=Safety)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: Output = field(default_factory=Output)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise, so that they have log-probs."""
        return self.objective in ("grpo", "guard", "dppo")

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference."""
        return self.grpo.kl_coef if self.stochastic else self.nft.kl_coef


SECTIONS = (Model, Data, Sampling, GRPO, NFT, Distillation, Rewards, Training, Safety, Evaluation)
for section in (*SECTIONS, Output):
    section.__pydantic_config__ = STRICT  # type: ignore[attr-defined]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field."""


def parse(arguments: Sequence[str]) -> Config:
    """Read the command line: a preset's name or a TOML file, then any field over it.

    Raises:
        ConfigError: a field is unknown, out of range, or goes with no other.
        SystemExit: the command line cannot be parsed, or asks for help.
    """
    presets = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    name, *rest = list(arguments) or ["--help"]
    if name.endswith(".toml"):
        name, presets = "file", {"file": Path(name)}
    elif name in presets:
        presets = {name: presets[name]}
    config = tyro.extras.overridable_config_cli(
        {name: _preset(path) for name, path in presets.items()},
        args=[name, *rest],
        prog=Path(sys.argv[0]).name,
        description="Reinforcement learning of FLUX editors on chains of edits. Choose a preset or "
        "give a TOML file; every field can be set over it.",
    )
    return checked(asdict(config))


def checked(values: dict[str, Any]) -> Config:
    """Validate the fields of a configuration one by one, then together.

    Raises:
        ConfigError: one line per wrong field.
    """
    config = _typed(values)
    problems = _unsound(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _typed(values: dict[str, Any]) -> Config:
    """Validate the fields one by one."""
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise ConfigError("\n".join(map(_in_words, error.errors()))) from None


def _preset(path: Path) -> tuple[str, Config]:
    """Read what a preset is about (its first comment) and its fields."""
    try:
        text = path.read_text(encoding="utf-8")
        config = _typed(tomllib.loads(text))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return text.partition("\n")[0].removeprefix("#").strip(), config


def _in_words(error: Any) -> str:
    """One of pydantic's errors as a line that names the field and what came."""
    name, what = ".".join(map(str, error["loc"])), error["msg"]
    return f"{name}: {what[0].lower()}{what[1:]}, got {error['input']!r}"


def _unsound(config: Config) -> Sequence[str]:
    """Fields that do not go together, in words."""
    data, sampling, training = config.data, config.sampling, config.training
    rewards, evaluation = config.rewards, config.evaluation
    found = []
    if config.objective == "dpo" and data.split_groups:
        found.append("data.split_groups: expected False for dpo, whose pairs are of one rank")
    if config.objective == "dpo" and config.nft.beta < 10:
        found.append(
            f"nft.beta: expected 10 or more for dpo (2000 is usual), got {config.nft.beta}"
        )
    if config.stochastic and sampling.stochastic_steps > sampling.steps:
        found.append(
            f"sampling.stochastic_steps: expected at most the {sampling.steps} steps of a turn, "
            f"got {sampling.stochastic_steps}"
        )
    if not any(rewards.weights.values()) or min(rewards.weights.values()) < 0:
        found.append(
            f"rewards.weights: expected weights >= 0, one of them above, got {rewards.weights}"
        )
    if rewards.scorer is None and not (rewards.judge and rewards.judge_model):
        found.append("rewards: expected judge and judge_model, or a scorer")
    wanted = rewards.weights.get("consistency") or rewards.floor is not None
    if rewards.scorer is None and not rewards.consistency and wanted:
        found.append(
            "rewards.consistency: expected the URL of a server, or weight 0 and no floor for it"
        )
    if rewards.scorer is not None and (rewards.judge or rewards.consistency):
        found.append("rewards.scorer: expected no judge and no consistency beside it")
    if rewards.scale == "binary" and rewards.success > 1:
        found.append(
            f"rewards.success: expected at most 1 on a binary scale, got {rewards.success}"
        )
    if evaluation.policy == "ema" and training.ema_decay == 0:
        found.append(
            "evaluation.policy: expected current or old, since ema_decay = 0 keeps no average"
        )
    if data.groups * data.group_size % training.minibatches:
        found.append(
            f"training.minibatches: expected a divisor of the {data.groups * data.group_size} "
            f"trajectories of a round, got {training.minibatches}"
        )
    return found
