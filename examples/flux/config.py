"""Options of a run: dataclasses, read strictly from files and words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import tyro
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mteditflow import GatedShare, LagrangeMultiplier, ReferenceReset
from mteditflow._text import parse_json
from mteditflow.objectives import (
    MTOPSD,
    NFT,
    OBJECTIVES,
    Distillation,
    Objective,
    ReplayObjective,
)
from mteditflow.rewards import RequestOptions
from mteditflow.training import DepthCurriculum, scheduled_turns

from .spelling import hint

RESUME = ("auto", "best", "never")
IDENTITY = "identity"  # reward of turns that ask for no change, which no scorer is shown
CONSECUTIVE = "consecutive"  # consistency with the turn before, beside that with the reference
SERVED = ("following", "consistency", CONSECUTIVE, IDENTITY)  # rewards that need no scorer
_Kind = TypeVar("_Kind")
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
# On the command line one word of JSON; a table in a preset file.
JsonObject = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda words: _json_object(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


@dataclass(frozen=True)
class Model:
    """The editor, and how it is held and run."""

    path: str = "black-forest-labs/FLUX.1-Kontext-dev"
    """Hub id or folder of a pipeline in diffusers format that edits an image or makes one of a
    text."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and arithmetic; adapters, log-probs and losses are float32 in either."""
    resolution: Count = 512
    """Side of all images, pixels; references are cropped to a square of it. With data.fit buckets
    the root of their area."""
    guidance: NonNegative = 2.5
    """Scale of guidance: embedded for Kontext and FLUX.2-dev, else classifier-free, as klein's. The
    pipeline's guidance_scale, of Qwen-Image-Edit true_cfg_scale."""
    options: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Further arguments of the pipeline call; in preset files alone."""
    lora_rank: Count = 64
    """Rank of the adapters."""
    lora_alpha: Count = 128
    """Their scale is alpha / rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the modules that get adapters; without a value: attention and feed-forward of all
    blocks."""
    lora: Path | None = None
    """LoRA to start from, a folder or file in diffusers' format; None: the base model."""
    lora_start: Literal["continue", "freeze"] = "continue"
    """continue: train it, with its modules and rank; freeze: train a new one above it. What a run
    saves holds both."""
    lora_reference: Literal["base", "start"] = "base"
    """Reference of objective.kl_coef: the base model, or it with the LoRA of model.lora."""
    checkpointing: bool = True
    """Recompute activations in the backward pass: less memory; an update takes 24% (NFT) to 45%
    (GRPO) more operations."""
    kept_blocks: Natural = 0
    """Blocks, the last ones, whose activations checkpointing keeps: for memory that is left over;
    mteditflow budget says how many fit."""
    compile: bool = False
    """Compile the repeated blocks with torch.compile: minutes at the start, faster after."""
    attention: str | None = None
    """Attention backend by diffusers' name, such as flash or sage; None: torch's own."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Hold the blocks' linear layers of transformer and text encoders in 8 bits (torchao) or 4
    (bitsandbytes): less memory; the policies, reference included, are those of the quantized
    model."""
    encoders: Literal["device", "host"] = "device"
    """Where text encoders work: device, where they are only while they embed new instructions; or
    host, which takes no memory of the device and minutes for the instructions of a round."""
    prompt_folder: Path | None = None
    """Folder for the embeddings of all instructions, made before the transformer is on the device
    and read by later runs: 4 MB each for Kontext, 13 MB for klein-9B; None: every run computes
    them."""
    vae_slicing: bool = False
    """Decode images one by one: less memory."""
    vae_tiling: bool = False
    """Decode images tile by tile: less memory where the autoencoder has small tiles; nothing up to
    1024 pixels for FLUX's. Results change a little."""
    shard: Literal["none", "fsdp2", "zero3"] = "none"
    """Where one device is short: fsdp2 shards all weights over ranks, zero3 (DeepSpeed) the base
    model's. none: every rank holds them whole."""


@dataclass(frozen=True)
class Data:
    """Chains, and how many make a round."""

    chains: Path = Path("chains.jsonl")
    """Chains to train on, in any format of python -m mteditflow.chains formats."""
    held_out: Path | None = None
    """Chains to evaluate on, never trained; None: no evaluation. Chains or reference images that
    are among those to train on are refused; split them by mteditflow chains split."""
    allow_overlap: bool = False
    """Whether held-out chains may share ids or reference images with those to train on; the log
    says so."""
    allow_outside: bool = False
    """Whether images may lie outside the folder of their file of chains."""
    fit: Literal["square", "buckets"] = "square"
    """square: references are cropped to squares; buckets: to the nearest of several shapes of the
    same area, up to 2 : 1, and every chain keeps the shape of its own."""
    bucket_multiple: Count = 64
    """Sides of buckets are multiples of this, pixels."""
    turns: Count = 3
    """Turns N of every chain; longer chains are cut, shorter ones left out. With growth.first the
    most turns of a chain. mt_opsd trains first turns alone, so only evaluations have N."""
    history: Literal["last", "original"] = "last"
    """Images that turns after the first are given: the last, or the original and the last; chains
    whose records have references say so themselves."""
    groups: Count = 8
    """Chains in a round, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Trajectories G of each chain: same reference and instructions, other noise."""
    split_groups: bool = False
    """Whether the trajectories of one chain may lie on several ranks."""
    draw: Literal["epochs", "informative"] = "epochs"
    """Every chain once an epoch; or chains anew each round, more often those whose trajectories
    differed in how well they followed."""
    extra_groups: Natural = 0
    """Groups of other chains that may be sampled in a round, over all ranks, in place of those that
    would train nothing, for equal rewards, or lost a member (DAPO's dynamic sampling); 0: none."""
    identity_share: Share = 0.0
    """Share of turns whose instruction is identity_instruction, drawn anew each round, alike for a
    group; such a turn is put in between the chain's own, of which as many fewer are made. Their
    reward is rewards.weights.identity."""
    identity_instruction: Annotated[str, Field(min_length=1)] = "Keep the image exactly as it is."
    """Instruction that asks for no change."""
    drift: Count = 10
    """mt_opsd: turns without a change that the student makes of a picture before the trained one.
    With growth.first the most of them."""


@dataclass(frozen=True)
class Growth:
    """Chains that get longer over the run, up to data.turns (mt_opsd: data.drift)."""

    first: Count | None = None
    """Turns of the first round; None: chains have all turns from the start."""
    every: Count | None = None
    """Rounds after which chains get one turn more; None: growth.change says when."""
    change: NonNegative | None = None
    """Mean absolute pixel change, 0 to 255, of turns that ask for none, at or below which chains
    get one turn more, once it holds for patience rounds in a row; None: growth.every says when."""
    patience: Count = 10
    """Rounds in a row that growth.change has to hold."""

    def turns(self, done: int, most: int) -> int:
        """Return the turns of a round's chains by the schedule; all of them without one."""
        if self.first is None or self.every is None:
            return most
        return scheduled_turns(done, first=self.first, every=self.every, most=most)


@dataclass(frozen=True)
class Sampling:
    """How trajectories are rolled out."""

    steps: Count = 6
    """Denoising steps S of a turn."""
    batch: Count = 8
    """Trajectories sampled at once on a rank; results do not depend on it, up to rounding."""
    model: str | None = None
    """Hub id or folder of a distilled sibling that samples in place of the model in training, with
    a copy of its adapters; objectives that re-noise alone. None: the model itself."""
    lora: Path | None = None
    """LoRA for few steps, a folder or file in diffusers' format, that is active while sampling and
    never trained or saved; objectives that re-noise alone. None: there is none."""
    guidance: NonNegative | None = None
    """Scale of guidance while sampling.model or sampling.lora samples, at which the model is then
    trained, too; 1 trains it without classifier-free guidance. None: model.guidance."""

    @property
    def few_steps(self) -> str | None:
        """Name of a field that gives a sampler for few steps; None: the model samples itself."""
        given = {"sampling.model": self.model, "sampling.lora": self.lora}
        return next((name for name, x in given.items() if x is not None), None)


@dataclass(frozen=True)
class Teacher:
    """The teacher of self_distillation.py; no other program has one."""

    path: Path | None = None
    """Folder of a LoRA of the run's rank and modules, such as a checkpoint's lora; it sees what the
    student sees. None: the base model (see model.lora_reference), which is shown clean images."""
    sessions: Path | None = None
    """mt_opsd: chains, neither trained nor evaluated on, on which the student is compared with its
    teacher; where it wins it takes its place. None: the teacher stays the base model."""
    every: Count = 4
    """Rounds between comparisons."""
    turns: tuple[Count, ...] = (10, 8, 5)
    """Turns up to which sessions are compared, the first to decide first."""
    success_margin: Count = 2
    """Sessions that have to succeed more for a promotion."""
    collapse_margin: Count = 3
    """Sessions that have to collapse fewer for a promotion."""
    degraded: float = 0.6
    """Consistency at or below which a turn's picture counts as degraded; two in a row are a
    collapse."""


@dataclass(frozen=True)
class Rewards:
    """Scoring services, and how scores become advantages."""

    judge: tuple[str, ...] = ()
    """URLs of the judge, ending in /v1: any OpenAI-compatible endpoints of one model."""
    judge_model: str = ""
    """Name that the judge is known by. Its key, if it wants one, is read from OPENAI_API_KEY."""
    scope: Literal["trajectory", "turn"] = "trajectory"
    """Scope of one call of the judge."""
    scale: Literal["likert", "binary"] | None = None
    """Scale of "following": likert, 1 to 5, or binary. None: likert of a judge; of a scorer the one
    that it declares."""
    thinking: bool = True
    """Whether it writes an analysis before its scores."""
    answer_format: Literal["json", "text"] = "json"
    """text: for endpoints without structured output."""
    answer_tokens: Count | None = None
    """Token limit of an answer; None: the question's own."""
    reasoning_tokens: Natural = 0
    """Tokens that a thinking model's own reasoning may take beyond its answer's."""
    chat_template_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the judge's chat template, such as {"enable_thinking": false}."""
    extra_body: JsonObject = field(default_factory=dict)
    """Further parameters of each request to the judge, such as {"top_p": 0.8}."""
    concurrency: Count = 64
    """Requests in flight to each service, from each rank."""
    timeout: Positive = 120.0
    """Seconds for an answer."""
    consistency: tuple[str, ...] = ()
    """URLs of mteditflow.rewards.server. Their token is read from MTEDITFLOW_TOKEN."""
    terms: Literal["features", "l1"] = "features"
    """Terms that consistency compares."""
    pairing: Literal["reference", "consecutive", "both"] = "reference"
    """Which image a turn's image is compared with: the chain's reference, that of the turn before,
    or both: "consistency" is then with the reference, and the reward "consecutive" with the turn
    before."""
    scorer: str | None = None
    """module:name of a scorer of your own, in place of both services."""
    weights: dict[str, float] = field(
        default_factory=lambda: {"following": 1.0, "consistency": 0.15}
    )
    """Weight of each reward: following; consistency; consecutive, with pairing both; identity, with
    data.identity_share; or those of a scorer. One of weight 0 is reported only."""
    aggregate: Literal["average", "successes", "all"] = "average"
    """How turns of "following" become one reward: their average score, the share of them that
    succeed, or 1 if all do."""
    credit: Literal["trajectory", "turn", "until_failure", "to_go", "mixture"] = "trajectory"
    """Turns that a reward is credited to. trajectory: all turns with the reward of the whole chain;
    turn: each with its own, normalized among the same turn of its group; until_failure: so up to
    the first turn that fails; to_go: each with the mean of its own and later ones; mixture: of the
    first two."""
    discount: Share = 1.0
    """Credit to_go: what a turn's reward counts for the turn before it; 0: credit turn."""
    trajectory_share: Share = 0.5
    """Credit mixture: share of the whole chain's signal beside the turn's own."""
    groups: Literal["all", "informative"] = "all"
    """Which groups are trained on; informative: not those in which all chains follow fully, none
    does at all, or all do equally well over their turns."""
    floor: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Smallest mean of consistency that is wanted: below it its weight grows round by round, by a
    Lagrange multiplier, and all weights are divided by 1 + multiplier; None: weights are fixed."""
    floor_rate: Positive = 5.0
    """Gain of the multiplier in a round for each unit that consistency lies below the floor."""
    floor_maximum: Positive = 10.0
    """Largest multiplier."""
    fusion: Literal["advantages", "rewards"] = "advantages"
    """Normalize each reward in its group and add advantages up, or add rewards up first."""
    std: Literal["group", "batch", "none"] = "group"
    """Divisor of advantages: the spread of the group, of the round, nothing."""
    advantage_limit: Positive = 5.0
    """Advantages are clamped to plus and minus this."""
    regions: bool = False
    """Credit latent tokens: each reward counts where the scorer's own regions say, as following
    does inside the edit and consistency outside of it; nft, awm and flow_awr."""
    region_normalization: Literal["mean", "rms", "none"] = "mean"
    """Statistic of the weights that is 1 over a picture's tokens: mean, so that a small region
    counts the more in it; rms, the root mean square; none, the largest: a small one counts less."""
    region_outside: Share = 0.0
    """Weight of a token outside of a reward's region, relative to one inside."""
    history: Natural = 0
    """Earlier rounds of the same chain whose rewards take part in its group's mean and standard
    deviation; for small groups. 0: none."""
    success: NonNegative | None = None
    """Score from which on a turn counts as followed: in evaluation, for aggregate successes and
    all, and for credit until_failure. None: that of the scale, 5 of 1 to 5, 1 of yes or no."""
    max_invalid: Share = 0.2
    """Share of a round's trajectories without a reward that stops the run."""

    @property
    def request(self) -> RequestOptions:
        """Options of every request to the judge."""
        return RequestOptions(
            self.answer_tokens, self.reasoning_tokens, self.chat_template_kwargs, self.extra_body
        )

    @property
    def multiplier(self) -> LagrangeMultiplier | None:
        """Multiplier of consistency at the start of a run; None without a floor."""
        if self.floor is None:
            return None
        return LagrangeMultiplier(self.floor, self.floor_rate, self.floor_maximum)


@dataclass(frozen=True)
class Gate:
    """KL to the reference on those trajectories alone whose trained rewards look too good."""

    auxiliary: tuple[str, ...] = ()
    """Rewards of weight 0, more is better, such as a scorer's "aesthetics": the KL of
    objective.kl_coef acts where the trained rewards rank a trajectory above them (GARDO). Without a
    value: it acts everywhere."""
    share: PositiveShare = 0.1
    """Share of a round's trajectories that are gated at first."""
    minimum: Share = 0.0
    """Smallest share."""
    maximum: PositiveShare = 1.0
    """Largest share, of which mteditflow budget takes the reference's passes."""
    window: Count = 20
    """Earlier rounds that a round's uncertainty is compared with: above all of them the share
    grows by a tenth, below all it falls by one."""

    @property
    def adaptive(self) -> GatedShare | None:
        """Share at the start of a run; None where nothing is gated."""
        if not self.auxiliary:
            return None
        return GatedShare(
            self.share, window=self.window, minimum=self.minimum, maximum=self.maximum
        )


@dataclass(frozen=True)
class Training:
    """The optimizer and the loop."""

    rounds: Count = 700
    """Rounds of sampling, scoring and updating."""
    inner_epochs: Count = 1
    """Passes over the samples of a round."""
    stop_kl: Positive | None = None
    """KL to the policy that sampled (the metric old_kl) beyond which the rest of a round's updates
    is left out; None: no bound."""
    kl_target: Positive | None = None
    """KL to the reference that objective.kl_coef is adapted to, round by round; None: it is
    fixed."""
    reset_steps: Count | None = None
    """Optimizer steps after which the current policy becomes the reference of objective.kl_coef, at
    the latest; takes an adapter more (GARDO: 100). None: the reference stays."""
    reset_kl: Positive = 1e-4
    """Mean KL to the reference in an optimizer step beyond which it does so at once."""
    minibatches: Count = 1
    """Optimizer steps in a pass, each on another part of the trajectories."""
    batch: Count = 4
    """Rows (one step of one turn; dpo: pairs of them) in a forward and backward pass; results do
    not depend on it, up to rounding."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: state of 8 bits a number, by bitsandbytes; saves 6 bytes for each trained one."""
    learning_rate: Positive = 3e-4
    """AdamW learning rate, the highest of the schedule."""
    warmup_rounds: Natural = 0
    """Rounds in which the learning rate rises in a straight line; 0: none."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after warm-up, down to final_rate of it."""
    final_rate: PositiveShare = 1.0
    """Share of the learning rate in the last round; 1 under linear: constant."""
    weight_decay: NonNegative = 1e-4
    """AdamW weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: Share = 0.9
    """Share d that the averaged policy keeps of itself; less at first, (1 + k)/(10 + k) at
    optimizer step k. 0: there is none."""
    ema_every: Count = 8
    """Optimizer steps between its updates."""
    seed: Natural = 0
    """Seed of adapters, chains and noise."""

    @property
    def reset(self) -> ReferenceReset | None:
        """When the reference is reset, as a run begins with it; None: never."""
        if self.reset_steps is None:
            return None
        return ReferenceReset(self.reset_kl, self.reset_steps)


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
    drift_members: Natural = 4
    """Trajectories of each group whose pictures are watched for drift (sharpness, colors, edges,
    variety), which never trains and stops nothing; 0: none."""
    drift_rounds: Annotated[int, Field(ge=3)] = 5
    """Early rounds that make the band of each statistic."""
    drift_width: Positive = 8.0
    """Half-width of a band, in standard errors of a round; an alarm is a value outside of it."""


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
    """Files of a run, and how often they are written."""

    folder: Path = Path("runs/flux")
    """Where everything goes."""
    resume: str = "auto"
    """auto: the newest whole checkpoint in the folder, if any; best; never; or a checkpoint's
    path."""
    checkpoint_every: Count = 10
    """Rounds between checkpoints."""
    keep: Count = 3
    """Checkpoints kept: the last ones, and always the best."""
    strips_every: Natural = 10
    """Rounds between pictures of chains and histograms; 0: none."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of accelerate, such as tensorboard, wandb, trackio; without a value: none."""
    project: Annotated[str, Field(min_length=1)] = "mteditflow"
    """Project of the run in the trackers; tensorboard: a folder of that name in trackers/."""
    run: Annotated[str, Field(min_length=1)] | None = None
    """Name of the run in wandb, trackio, mlflow, swanlab and clearml; None: that of its folder."""


RewardedObjective = Union[tuple(c for c in OBJECTIVES.values() if c.card.rewarded)]  # noqa: UP007


@dataclass(frozen=True)
class Config:
    """Reinforcement learning of FLUX, Qwen-Image-Edit and other pipelines on chains of edits."""

    __pydantic_config__ = STRICT

    objective: RewardedObjective = field(default_factory=NFT)
    """Loss and its hyperparameters; another one of the same kind by objective:NAME."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    growth: Growth = field(default_factory=Growth)
    sampling: Sampling = field(default_factory=Sampling)
    rewards: Rewards = field(default_factory=Rewards)
    gate: Gate = field(default_factory=Gate)
    training: Training = field(default_factory=Training)
    safety: Safety = field(default_factory=Safety)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: Output = field(default_factory=Output)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise, so that they have log-probs."""
        return isinstance(self.objective, ReplayObjective)

    @property
    def drifts(self) -> bool:
        """Whether the student wears pictures out itself, by turns that ask for no change."""
        return isinstance(self.objective, MTOPSD)

    @property
    def most_turns(self) -> int:
        """Turns of a chain when it has grown; of mt_opsd those that ask for no change."""
        return self.data.drift if self.drifts else self.data.turns

    @property
    def curriculum(self) -> DepthCurriculum | None:
        """How chains grow by what the editor leaves still, as a run begins with it."""
        first, change = self.growth.first, self.growth.change
        if first is None or change is None:
            return None
        return DepthCurriculum(first, self.most_turns, change, self.growth.patience)


@dataclass(frozen=True)
class DistillationConfig(Config):
    """Self-distillation of FLUX, Qwen-Image-Edit and other pipelines on chains of edits."""

    objective: Distillation | MTOPSD = field(  # type: ignore[assignment]
        default_factory=Distillation
    )
    """Loss and its hyperparameters; objective:mt_opsd is the other one."""
    teacher: Teacher = field(default_factory=Teacher)


SECTIONS = (
    *(Model, Data, Growth, Sampling, Teacher, Rewards, Gate),
    *(Training, Safety, Evaluation, Output),
)
for section in (*SECTIONS, DistillationConfig):
    section.__pydantic_config__ = STRICT  # type: ignore[attr-defined]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field."""


def typed(values: dict[str, Any], kind: type[Config] = Config) -> Config:
    """Validate fields one by one, those of the objective by its own class.

    Args:
        values: sections by name, as a preset file or a checkpoint holds them; the objective's has
            its "name" beside its fields.
        kind: class of the configuration.

    Raises:
        ConfigError: one line per wrong field.
    """
    values = dict(values)
    given = values.pop("objective", None)
    objective = {} if given is None else {"objective": _objective(given, rewarded=kind is Config)}
    try:
        return replace(_strictly(kind, values), **objective)
    except ValidationError as error:
        known = field_names(kind())
        raise ConfigError("\n".join(_in_words(x, known) for x in error.errors())) from None


def field_names(config: Config) -> list[str]:
    """Return the dotted names of all fields and sections, those of the objective included."""

    def walk(prefix: str, section: Any) -> Iterator[str]:
        for entry in fields(section):
            name, value = f"{prefix}{entry.name}", getattr(section, entry.name)
            yield name
            if is_dataclass(value):
                yield from walk(f"{name}.", value)

    return list(walk("", config))


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """Return what reads and writes the fields of a class; making one takes longer than its use."""
    return TypeAdapter(kind)


def _strictly(kind: type[_Kind], values: dict[str, Any]) -> _Kind:
    """Build a dataclass from what JSON or TOML can hold: true and "4" are no numbers.

    Raises:
        ValidationError: a value is of another type, or out of range.
    """
    built: _Kind = _adapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    return built


def dumped(config: Config) -> dict[str, Any]:
    """Return the fields as JSON holds them, for ``typed`` to read again."""
    values = {
        name: _adapter(type(getattr(config, name))).dump_python(getattr(config, name), mode="json")
        for name in (f.name for f in fields(config))
    }
    values["objective"] = {"name": name_of(config.objective), **values["objective"]}
    return values


def flat(config: Config) -> dict[str, Any]:
    """Return fields by dotted name, as trackers take them."""

    def walk(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict) and prefix != "rewards":
                yield from walk(f"{prefix}.{name}".lstrip("."), value)
            else:
                kept = value if isinstance(value, (int, float, str)) else str(value)
                yield f"{prefix}.{name}".lstrip("."), kept

    return dict(walk("", dumped(config)))


def name_of(objective: Objective) -> str:
    """Return the name of an objective on the command line."""
    return next(name for name, kind in OBJECTIVES.items() if type(objective) is kind)


def _objective(given: Any, *, rewarded: bool) -> Objective:
    """Build an objective, of those with or without a reward, from its name and fields.

    Raises:
        ConfigError: there is no such name, or a field is wrong.
    """
    values = dict(given) if isinstance(given, dict) else {"name": given}
    name = values.pop("name", None)
    names = [key for key, kind in OBJECTIVES.items() if kind.card.rewarded == rewarded]
    if name not in names:
        raise ConfigError(f"objective.name: expected one of {names}, got {name!r}")
    default = OBJECTIVES[name]()
    unknown = list(_unknown_fields(default, values))
    known = [x for x in field_names(Config(objective=default)) if x.startswith("objective.")]
    if unknown:
        field = f"objective.{unknown[0]}"
        raise ConfigError(f"{field}: {name} has no such field{hint(field, known)}")
    try:
        return _strictly(OBJECTIVES[name], values)
    except ValidationError as error:
        lines = [f"objective.{_in_words(problem, known)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _json_object(text: str) -> dict[str, Any]:
    """Parse an option that takes a JSON object.

    Raises:
        ValueError: it is none.
    """
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text!r}")
    return value


def _unknown_fields(defaults: Any, values: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted names that a dataclass, or one inside it, does not have."""
    for key, value in values.items():
        inner = getattr(defaults, key, None) if isinstance(key, str) else None
        if key not in {f.name for f in fields(defaults)}:
            yield str(key)
        elif is_dataclass(inner) and isinstance(value, dict):
            yield from (f"{key}.{name}" for name in _unknown_fields(inner, value))


def _in_words(error: Any, known: Sequence[str]) -> str:
    """Return one of pydantic's errors as a line that names the field, what came, and a near one."""
    name, what = ".".join(map(str, error["loc"])), error["msg"]
    if error["type"] == "value_error":  # of the library's checks: names the field and the value
        return f"{name}.{what.removeprefix('Value error, ')}".removeprefix(".")
    near = hint(name, known) if error["type"] == "unexpected_keyword_argument" else ""
    return f"{name}: {what[0].lower()}{what[1:]}, got {error['input']!r}{near}".removeprefix(": ")
