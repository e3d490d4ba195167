"""The pipelines of docs/support.md: one recording of each form, and a page that has them all.

``make support`` runs every check of every pipeline (tests/pipelines/tiny_pipelines/checks.py) and
writes the page; these tests run the first check of a pipeline of each form.
"""

import json

import pytest
from tiny_pipelines import FAMILIES, NOT_BUILT, REFUSED
from tiny_pipelines.checks import Case

from docs.render_support import FACTS, PAGE, cases, check, class_of, flow_classes, page, refusal

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated"),
]

FORMS = [
    ("FluxImg2ImgPipeline", "embedded"),
    ("FluxFillPipeline", "embedded"),
    ("StableDiffusion3Pipeline", "classifier-free"),
    ("QwenImagePipeline", "classifier-free, norm rescaled"),
    ("ZImagePipeline", "classifier-free, truncated"),
    ("LuminaPipeline", "none"),
    ("CogView4Pipeline", "none"),
    ("HiDreamImagePipeline", "none"),
    ("LongCatImagePipeline", "classifier-free, norm rescaled"),
    ("LTXPipeline", "classifier-free, std rescaled"),
    ("WanImageToVideoPipeline", "classifier-free"),
    ("Flux2KleinBaseModularPipeline, tangential", "tangential"),
]


UNSUPPORTED = [
    ("StableDiffusion3PAGPipeline", "classifier-free and perturbed attention"),
    ("JoyImageEditPipeline", "classifier-free"),
    ("PRXPixelPipeline", "none"),
]


@pytest.fixture(scope="module")
def facts():
    return json.loads(FACTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "kind"), FORMS)
def test_recorded_steps_are_replayed_with_ratio_one(facts, name, kind):
    seen = Case(FAMILIES[name], kind).facts()
    ratio = seen.pop("ratio")  # its roundings depend on the machine
    (row,) = [r for r in facts["recorded"] if (r["pipeline"], r["guidance"]) == (name, kind)]
    assert row | seen == row
    assert ratio.startswith("1; mixed: 1 to ")


@pytest.mark.parametrize(("name", "kind"), UNSUPPORTED)
def test_what_is_refused_says_why_and_leaves_the_pipeline_as_it_was(facts, name, kind):
    (row,) = [r for r in facts["refused"] if (r["pipeline"], r["guidance"]) == (name, kind)]
    assert check(name, kind) == ("refused", {"error": row["error"]})
    case = Case(FAMILIES[name], kind)
    scheduler = case.pipeline.scheduler
    with pytest.raises(ValueError, match="cannot replay this pipeline"):
        case.facts()
    assert case.pipeline.scheduler is scheduler
    assert not case.model._forward_hooks


@pytest.mark.parametrize("what", REFUSED)
def test_options_that_are_refused_say_why(facts, what):
    (row,) = [r for r in facts["refused"] if r["pipeline"] == what]
    assert refusal(what) == row["error"]


def test_every_flow_pipeline_of_diffusers_has_a_row_or_a_reason(facts):
    assert set(facts["flow_classes"]) == flow_classes()
    told = [row["pipeline"] for row in facts["recorded"] + facts["refused"]]
    assert not flow_classes() - {class_of(name) for name in told} - set(NOT_BUILT)
    assert facts["not_built"] == NOT_BUILT
    assert all(NOT_BUILT.values())


def test_at_least_forty_classes_are_recorded(facts):
    assert len({class_of(row["pipeline"]) for row in facts["recorded"]}) >= 40


def test_the_page_is_that_of_the_facts_and_has_every_case(facts):
    assert PAGE.read_text(encoding="utf-8") == page(facts)
    told = [(row["pipeline"], row["guidance"]) for row in facts["recorded"] + facts["refused"]]
    assert set(told) == {*cases(), *((what, "") for what in REFUSED)}
    assert len(told) == len(set(told))
