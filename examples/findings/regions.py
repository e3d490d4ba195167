"""Credit by regions: each reward on the latent tokens that it is about."""

from __future__ import annotations

from .settings import BASE, CONSISTENCY, JUDGES
from .study import Claim, Finding, Setting, Study

OWN = {"rewards.credit": "turn"}
ON = {**OWN, "rewards.regions": True}
NORMALIZATION, OUTSIDE = "rewards.region_normalization", "rewards.region_outside"
BOXES = {"rewards.scorer": f"{JUDGES}:BoxedRewards"}

WHOLE = Setting("whole picture", OWN)
FORMS = (
    WHOLE,
    Setting("mean", ON),
    Setting("rms", {**ON, NORMALIZATION: "rms"}),
    Setting("none", {**ON, NORMALIZATION: "none"}),
    Setting("mean, outside 0.25", {**ON, OUTSIDE: 0.25}),
    Setting("rms, outside 0.25", {**ON, NORMALIZATION: "rms", OUTSIDE: 0.25}),
    Setting("mean, w_CC 1", {**ON, CONSISTENCY: 1.0}),
)
BY_BOXES = (
    WHOLE,
    Setting("masks, rms", FORMS[2].options),
    Setting("boxes, rms", {**FORMS[2].options, **BOXES}),
    Setting("boxes, rms, outside 0.25", {**FORMS[5].options, **BOXES}),
)


def _claims(settings: tuple[Setting, ...]) -> tuple[Claim, ...]:
    better = (Claim(x.label, WHOLE.label) for x in settings[1:])
    metrics = ("content_consistency", "strict")
    others = (Claim(x.label, WHOLE.label, metric) for metric in metrics for x in settings[1:])
    return (*better, *others)


REGIONS = Study(
    "regions",
    "Credit to regions: following where the edit is, consistency elsewhere",
    BASE,
    "the preset `shapes-nft`: one advantage per trajectory for all of a picture; whole picture and "
    "regions have one advantage per turn",
    (
        Finding(
            "forms",
            "Exact masks: normalization of the weights, and what counts outside",
            (Setting("broadcast"), *FORMS),
            (Claim(WHOLE.label, "broadcast"), *_claims(FORMS)),
            note="Weights of the tokens of a picture have mean 1, root mean square 1, or are the "
            "covered shares as they are. Outside 0.25: a token outside of a reward's region has a "
            "quarter of the weight of one inside.",
        ),
        Finding(
            "boxes",
            "Boxes, as a detector would give them",
            BY_BOXES,
            (*_claims(BY_BOXES), Claim("boxes, rms", "masks, rms")),
        ),
    ),
)
