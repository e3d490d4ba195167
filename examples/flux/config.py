"""Options of a run: dataclasses, read strictly from TOML files and the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from pydantic import ConfigDict, Field

from mteditflow import GatedShare, LagrangeMultiplier, ReferenceReset
from mteditflow._text import parse_json
from mteditflow.objectives import (
    MTOPSD,
    NFT,
    OBJECTIVES,
    Distillation,
    ReplayObjective,
)
from mteditflow.rewards import RequestOptions
from mteditflow.training import DepthCurriculum, learning_rate_share, scheduled_turns

RESUME = ("auto", "best", "never")
IDENTITY = "identity"  # reward of identity turns, computed from pixels; no scorer sees them
CONSECUTIVE = "consecutive"  # consistency with the previous turn, in addition to the reference
SERVED = ("following", "consistency", CONSECUTIVE, IDENTITY)  # rewards without a custom scorer
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
# One JSON argument on the command line; a table in a preset file.
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
    """The editing pipeline: weights, adapters, precision and memory."""

    path: str = "black-forest-labs/FLUX.1-Kontext-dev"
    """Pipeline in diffusers format, image editing or text to image: a Hub id or a folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and arithmetic; adapters, log-probs and losses are float32 in either."""
    resolution: Count = 512
    """Side of all images in pixels; references are cropped to this square. With data.fit buckets:
    the square root of an image's area."""
    guidance: NonNegative = 2.5
    """Guidance scale: embedded for Kontext and FLUX.2-dev, classifier-free for others such as
    klein. Passed to the pipeline as guidance_scale, to Qwen-Image-Edit as true_cfg_scale."""
    options: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Further arguments of the pipeline call; in preset files only."""
    lora_rank: Count = 64
    """Rank of the adapters."""
    lora_alpha: Count = 128
    """LoRA alpha; the adapters are scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the modules that get adapters; empty: attention and feed-forward of all blocks."""
    lora: Path | None = None
    """LoRA to start from, a folder or file in diffusers' format; None: the base model."""
    lora_start: Literal["continue", "freeze"] = "continue"
    """continue: train model.lora, with its modules and rank; freeze: keep it fixed and train a new
    LoRA on top. Checkpoints contain both."""
    lora_reference: Literal["base", "start"] = "base"
    """Reference policy of objective.kl_coef. base: the base model; start: the base model with
    model.lora."""
    checkpointing: bool = True
    """Recompute activations in the backward pass: less memory; an update of the presets takes about
    45% more operations."""
    kept_blocks: Natural = 0
    """Number of last blocks whose activations are kept despite checkpointing; raise it if memory is
    left over. mteditflow budget computes how many fit."""
    compile: bool = False
    """Compile the repeated blocks with torch.compile: minutes at the start, faster steps."""
    attention: str | None = None
    """Attention backend by diffusers' name, such as flash or sage; None: torch's own."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Quantize the linear layers of transformer blocks and text encoders to 8 bits (int8, torchao)
    or 4 bits (nf4, bitsandbytes): less memory. All policies, the reference included, then use the
    quantized weights."""
    encoders: Literal["device", "host"] = "device"
    """Where the text encoders run. device: moved there only to embed new instructions; host: on the
    CPU, without device memory, but minutes for the instructions of a round."""
    prompt_folder: Path | None = None
    """Folder that stores the embeddings of all instructions, computed before the transformer moves
    to the device and reused by later runs: 4 MB each for Kontext, 13 MB for klein-9B. None: every
    run computes them."""
    vae_slicing: bool = False
    """Decode images one by one: less memory."""
    vae_tiling: bool = False
    """Decode images tile by tile: less memory where tiles are smaller than the image (FLUX: above
    1024 pixels). Results change slightly."""
    shard: Literal["none", "fsdp2", "zero3"] = "none"
    """Sharding, if the model does not fit on one device. fsdp2: all weights over ranks; zero3
    (DeepSpeed): only those of the base model; none: a full copy on every rank."""


@dataclass(frozen=True)
class Data:
    """Chains to train and evaluate on, and the size of a round."""

    chains: Path = Path("chains.jsonl")
    """Training chains, in any format listed by python -m mteditflow.chains formats."""
    held_out: Path | None = None
    """Chains for evaluation; None: no evaluation. Chains or reference images that are also in
    data.chains are refused; mteditflow chains split makes disjoint files."""
    allow_overlap: bool = False
    """Allow held-out chains to share ids or reference images with training chains; the log has a
    warning."""
    allow_outside: bool = False
    """Allow image paths outside the folder of the chains file."""
    fit: Literal["square", "buckets"] = "square"
    """square: crop references to squares; buckets: crop each to the nearest of several shapes of
    equal area, up to 2 : 1, which its chain keeps."""
    bucket_multiple: Count = 64
    """Sides of buckets are multiples of this, in pixels."""
    turns: Count = 3
    """Turns N of every chain; longer chains are cut, shorter ones left out. With growth.first: the
    final number. mt_opsd trains only on first turns and uses N in evaluations."""
    history: Literal["last", "original"] = "last"
    """Input images of turns after the first. last: the previous result; original: the original and
    the previous result. References in a chain's record take precedence."""
    groups: Count = 8
    """Chains in a round, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Trajectories G of each chain: same reference and instructions, different noise."""
    split_groups: bool = False
    """Allow the trajectories of one chain to be on several ranks."""
    draw: Literal["epochs", "informative"] = "epochs"
    """Order of chains. epochs: every chain once per epoch; informative: drawn at random each round,
    chains whose group differed in following more often."""
    extra_groups: Natural = 0
    """Most groups of other chains to sample in a round, over all ranks, as replacements for groups
    of equal rewards or with a lost reward (DAPO's dynamic sampling); 0: none."""
    identity_share: Share = 0.0
    """Share of turns with identity_instruction, drawn each round, the same for a whole group. The
    number of turns stays the same, so the chain's last edits are left out. Such turns earn the
    reward identity, weighted by rewards.weights.identity."""
    identity_instruction: Annotated[str, Field(min_length=1)] = "Keep the image exactly as it is."
    """Instruction that asks for no change."""
    drift: Count = 10
    """mt_opsd: identity turns that the student makes before the trained turn. With growth.first:
    the final number."""


@dataclass(frozen=True)
class Growth:
    """Curriculum of chain length, up to data.turns (mt_opsd: data.drift)."""

    first: Count | None = None
    """Turns in the first round; None: all turns from the start."""
    every: Count | None = None
    """Rounds until chains get one turn more; None: growth.change decides."""
    change: NonNegative | None = None
    """Mean absolute pixel change of identity turns, 0 to 255: chains get one turn more after
    growth.patience rounds in a row at or below it. None: growth.every decides."""
    patience: Count = 10
    """Consecutive rounds that growth.change must hold."""

    def turns(self, done: int, most: int) -> int:
        """Return the scheduled number of turns after ``done`` rounds; ``most`` without a schedule.

        A curriculum by ``change`` is kept in ``State.depth`` instead.
        """
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
    """Distilled sibling that samples in place of the trained model, with a copy of its adapters: a
    Hub id or a folder. Only for objectives that re-noise. None: the model samples itself."""
    lora: Path | None = None
    """Few-step LoRA, a folder or file in diffusers' format: active only while sampling, never
    trained or saved. Only for objectives that re-noise. None: no such LoRA."""
    guidance: NonNegative | None = None
    """Guidance scale of sampling and training with sampling.model or sampling.lora; 1: without
    classifier-free guidance. None: model.guidance."""

    @property
    def few_steps(self) -> str | None:
        """Name of the field that selects a few-step sampler; None: the model samples itself."""
        given = {"sampling.model": self.model, "sampling.lora": self.lora}
        return next((name for name, x in given.items() if x is not None), None)


@dataclass(frozen=True)
class Teacher:
    """The teacher, for self_distillation.py only."""

    path: Path | None = None
    """LoRA folder of the run's rank and modules, such as a checkpoint's lora; this teacher sees the
    student's images. None: the base model (see model.lora_reference), which sees clean images."""
    sessions: Path | None = None
    """mt_opsd: chains, disjoint from data.chains and data.held_out, on which student and teacher
    are compared; a winning student replaces the teacher. None: the teacher stays the base model."""
    every: Count = 4
    """Rounds between comparisons."""
    turns: tuple[Count, ...] = (10, 8, 5)
    """Turns up to which sessions are compared; the first of them decides first."""
    success_margin: Count = 2
    """Increase in successful sessions that is enough for a promotion."""
    collapse_margin: Count = 3
    """Decrease in collapsed sessions that is enough for a promotion."""
    degraded: float = 0.6
    """Consistency at or below which a turn's image is degraded; two in a row are a collapse."""


@dataclass(frozen=True)
class Rewards:
    """Scoring services, and how scores become advantages."""

    judge: tuple[str, ...] = ()
    """URLs of the judge, ending in /v1: OpenAI-compatible endpoints that serve one model."""
    judge_model: str = ""
    """Model name sent to the judge's endpoints. The API key is read from OPENAI_API_KEY."""
    scope: Literal["trajectory", "turn"] = "trajectory"
    """Turns that one judge call scores: the whole trajectory, or one turn."""
    scale: Literal["likert", "binary"] | None = None
    """Scale of "following": likert (1 to 5) or binary. None: likert for a judge; for a scorer the
    scale that its class declares."""
    thinking: bool = True
    """Ask the judge for an analysis before its scores."""
    answer_format: Literal["json", "text"] = "json"
    """Format of the judge's answers; text: for endpoints without structured output."""
    answer_tokens: Count | None = None
    """Token limit of an answer; None: the prompt's default."""
    reasoning_tokens: Natural = 0
    """Tokens allowed for a reasoning model's own reasoning, beyond those of the answer."""
    chat_template_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the judge's chat template, such as {"enable_thinking": false}."""
    extra_body: JsonObject = field(default_factory=dict)
    """Further parameters of each request to the judge, such as {"top_p": 0.8}."""
    concurrency: Count = 64
    """Requests in flight to each service, from each rank."""
    timeout: Positive = 120.0
    """Seconds to wait for an answer."""
    consistency: tuple[str, ...] = ()
    """URLs of mteditflow.rewards.server. The token is read from MTEDITFLOW_TOKEN."""
    terms: Literal["features", "l1"] = "features"
    """Consistency measure: feature similarities, or L1 distances of pixels."""
    pairing: Literal["reference", "consecutive", "both"] = "reference"
    """Image that a turn's image is compared with: the chain's reference, the previous turn's
    image, or both. With both, "consistency" compares with the reference and the additional reward
    "consecutive" with the previous turn."""
    scorer: str | None = None
    """Custom scorer, module:name, in place of judge and consistency server."""
    weights: dict[str, float] = field(
        default_factory=lambda: {"following": 1.0, "consistency": 0.15}
    )
    """Weight of each reward: following; consistency; consecutive (pairing both); identity
    (data.identity_share); or a custom scorer's. Rewards of weight 0 are only reported."""
    aggregate: Literal["average", "successes", "all"] = "average"
    """How the turns of "following" become one reward: average score, share of successful turns, or
    1 only if all succeed."""
    credit: Literal["trajectory", "turn", "until_failure", "to_go", "mixture"] = "trajectory"
    """Credit of a turn. trajectory: the whole chain's reward; turn: its own reward, normalized
    among the same turns of its group; until_failure: as turn, but only up to the first failed turn;
    to_go: mean of its own and later rewards; mixture: trajectory and turn, weighted."""
    discount: Share = 1.0
    """Credit to_go: weight of a turn's reward in the credit of the previous turn; 0: as credit
    turn."""
    trajectory_share: Share = 0.5
    """Credit mixture: share of the whole chain's reward; the rest is the turn's own."""
    groups: Literal["all", "informative"] = "all"
    """Groups to train on. informative: leaves out groups in which all chains succeed fully, all
    fail, or all do equally well."""
    floor: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Lower bound of mean consistency: below it a Lagrange multiplier is added to its weight each
    round, and all weights are divided by 1 + multiplier. None: fixed weights."""
    floor_rate: Positive = 5.0
    """Increase of the multiplier per round and unit of consistency below the floor."""
    floor_maximum: Positive = 10.0
    """Largest multiplier."""
    fusion: Literal["advantages", "rewards"] = "advantages"
    """advantages: normalize each reward in its group, then add; rewards: add, then normalize."""
    std: Literal["group", "batch", "none"] = "group"
    """Divisor of advantages: standard deviation of the group, of the round, or none."""
    advantage_limit: Positive = 5.0
    """Advantages are clamped to plus or minus this."""
    regions: bool = False
    """Per-token credit: each reward counts in the region that the scorer gives, such as following
    inside the edit and consistency outside of it. Only for nft, awm and flow_awr."""
    region_normalization: Literal["mean", "rms", "none"] = "mean"
    """Scale of a region's token weights. mean: mean 1, so tokens of a small region weigh more; rms:
    root mean square 1; none: at most 1, so a small region counts less."""
    region_outside: Share = 0.0
    """Weight of a token outside a reward's region, relative to one inside."""
    history: Natural = 0
    """Earlier rounds whose rewards of the same chain enter its group's mean and standard deviation;
    for small groups. 0: none."""
    success: NonNegative | None = None
    """Score from which a turn counts as followed, in evaluation, aggregate successes and all, and
    credit until_failure. None: the scale's default, 5 for likert, 1 for binary."""
    max_invalid: Share = 0.2
    """Stop the run if more than this share of a round's trajectories lack a reward."""

    @property
    def request(self) -> RequestOptions:
        """Options of all requests to the judge."""
        return RequestOptions(
            self.answer_tokens, self.reasoning_tokens, self.chat_template_kwargs, self.extra_body
        )

    @property
    def multiplier(self) -> LagrangeMultiplier | None:
        """Initial multiplier of consistency; None without a floor."""
        if self.floor is None:
            return None
        return LagrangeMultiplier(self.floor, self.floor_rate, self.floor_maximum)


@dataclass(frozen=True)
class Gate:
    """KL to the reference only on trajectories whose trained rewards look too good."""

    auxiliary: tuple[str, ...] = ()
    """Rewards of weight 0 where more is better, such as a scorer's "aesthetics": the KL of
    objective.kl_coef acts where the trained rewards rank a trajectory above them (GARDO). Without a
    value: it acts everywhere."""
    share: PositiveShare = 0.1
    """Initial share of a round's trajectories that are gated."""
    minimum: Share = 0.0
    """Smallest share."""
    maximum: PositiveShare = 1.0
    """Largest share; mteditflow budget counts the reference's passes at it."""
    window: Count = 20
    """Number of earlier rounds that a round's uncertainty is compared with: above all of them the
    share grows by a tenth, below all of them it shrinks by a tenth."""

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
    """KL to the policy that sampled (metric old_kl) above which the round's remaining updates are
    skipped; None: no bound."""
    kl_target: Positive | None = None
    """Target of the KL to the reference, to which objective.kl_coef is adapted each round; None:
    fixed kl_coef."""
    reset_steps: Count | None = None
    """Optimizer steps after which the current policy becomes the reference of objective.kl_coef, at
    the latest (GARDO: 100); takes the memory of one more adapter. None: the reference stays."""
    reset_kl: Positive = 1e-4
    """Mean KL to the reference in an optimizer step above which it is reset at once; used only with
    training.reset_steps."""
    minibatches: Count = 1
    """Optimizer steps per pass, each on another part of the trajectories."""
    batch: Count = 4
    """Rows (one step of one turn; dpo: pairs of them) per forward and backward pass; results do
    not depend on it, up to rounding."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: optimizer state in 8 bits (bitsandbytes); saves 6 bytes per trained
    parameter."""
    learning_rate: Positive = 3e-4
    """AdamW learning rate, the peak of the schedule."""
    warmup_rounds: Natural = 0
    """Rounds of linear learning-rate warm-up; 0: none."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning-rate schedule after warm-up; linear and cosine fall to final_rate times the peak."""
    final_rate: PositiveShare = 1.0
    """Learning rate of the last round, as a share of the peak; 1 with linear: constant."""
    weight_decay: NonNegative = 1e-4
    """AdamW weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm."""
    ema_decay: Share = 0.9
    """Decay of the averaged (EMA) policy: min(ema_decay, (1 + k) / (10 + k)) at optimizer step k.
    0: no averaged policy."""
    ema_every: Count = 8
    """Optimizer steps between updates of the averaged policy."""
    seed: Natural = 0
    """Seed of adapters, chains and noise."""

    @property
    def reset(self) -> ReferenceReset | None:
        """When the reference is reset, as a run begins with it; None: never."""
        if self.reset_steps is None:
            return None
        return ReferenceReset(self.reset_kl, self.reset_steps)

    def rate(self, done: int) -> float:
        """Return the learning rate of the round after ``done`` rounds; ``done`` < ``rounds``."""
        return self.learning_rate * learning_rate_share(
            done,
            self.rounds,
            schedule=self.schedule,
            warmup=self.warmup_rounds,
            final=self.final_rate if self.schedule != "constant" else 1.0,
        )


@dataclass(frozen=True)
class Safety:
    """Circuit breakers and drift alarms."""

    ratio: Literal["stop", "warn"] = "stop"
    """GRPO: what to do if ratios on the first rollout are not 1."""
    ratio_share: Positive = 0.1
    """GRPO: allowed deviation of a ratio from 1, as a share of the clip range."""
    collapse_drop: PositiveShare = 0.3
    """Stop if a reward falls by this share below its best; 1: never."""
    collapse_window: Count = 20
    """Rounds in the moving average that collapse_drop compares."""
    max_skipped: Count = 5
    """Stop after this many updates in a row are skipped because of non-finite losses."""
    max_flat: Count | None = 10
    """Stop after this many rounds in a row whose rewards train nothing, since they are equal within
    each group or missing; a run of such rounds alone fails at its end. None: never."""
    drift_members: Natural = 4
    """Trajectories of each group whose images are measured for drift (sharpness, colors, edges,
    variety); alarms affect neither training nor the run. 0: none."""
    drift_rounds: Annotated[int, Field(ge=3)] = 5
    """First rounds from which the band of each statistic is computed."""
    drift_width: Positive = 8.0
    """Half-width of a band, in spreads of the first rounds; a median of recent rounds outside the
    band is an alarm."""


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on held-out chains, with the same noise every time."""

    every: Count = 50
    """Rounds between evaluations; also before the first and after the last."""
    steps: Count = 28
    """Denoising steps of a turn."""
    batch: Count = 8
    """Trajectories sampled at once on a rank."""
    policy: Literal["current", "old", "ema"] = "ema"
    """Policy to evaluate, and to save as lora in checkpoints; ema needs training.ema_decay > 0."""


@dataclass(frozen=True)
class Output:
    """Files of a run, and how often they are written."""

    folder: Path = Path("runs/flux")
    """Folder for all files of the run."""
    resume: str = "auto"
    """Checkpoint to resume from. auto: the newest intact one in output.folder, if any; best; never;
    or a checkpoint's path."""
    checkpoint_every: Count = 10
    """Rounds between checkpoints."""
    keep: Count = 3
    """Number of last checkpoints to keep, in addition to the best."""
    strips_every: Natural = 10
    """Rounds between pictures of chains and histograms; 0: none."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers supported by accelerate, such as tensorboard, wandb, trackio; empty: none."""
    project: Annotated[str, Field(min_length=1)] = "mteditflow"
    """Project name in the trackers; tensorboard: a folder of that name in trackers/."""
    run: Annotated[str, Field(min_length=1)] | None = None
    """Run name in wandb, trackio, mlflow, swanlab and clearml; None: that of output.folder."""


RewardedObjective = Union[tuple(c for c in OBJECTIVES.values() if c.card.rewarded)]  # noqa: UP007


@dataclass(frozen=True)
class Config:
    """Reinforcement learning of FLUX, Qwen-Image-Edit and other pipelines on chains of edits."""

    __pydantic_config__ = STRICT

    objective: RewardedObjective = field(default_factory=NFT)
    """Loss and its hyperparameters; objective:NAME selects another of the same kind."""
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
        """Whether sampling steps draw noise and therefore have log-probs."""
        return isinstance(self.objective, ReplayObjective)

    @property
    def drifts(self) -> bool:
        """Whether the student degrades images by identity turns before the trained turn."""
        return isinstance(self.objective, MTOPSD)

    @property
    def most_turns(self) -> int:
        """Final number of turns of a chain; under mt_opsd, of its identity turns."""
        return self.data.drift if self.drifts else self.data.turns

    @property
    def curriculum(self) -> DepthCurriculum | None:
        """Initial curriculum by pixel change of identity turns; None without growth.change."""
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
    """Loss and its hyperparameters: distillation, or objective:mt_opsd."""
    teacher: Teacher = field(default_factory=Teacher)


SECTIONS = (
    *(Model, Data, Growth, Sampling, Teacher, Rewards, Gate),
    *(Training, Safety, Evaluation, Output),
)
for section in (*SECTIONS, DistillationConfig):
    section.__pydantic_config__ = STRICT  # type: ignore[attr-defined]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field."""


def _json_object(text: str) -> dict[str, Any]:
    """Parse the value of an option that takes a JSON object.

    Raises:
        ValueError: the text is not a JSON object.
    """
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text!r}")
    return value
