"""Each law finds the fault that it is there for, and no law is there for nothing."""

import pytest
from planted import PLANTED

from mteditflow.testing import KINDS, LawBroken

CASES = [
    pytest.param(kind, subject, law, id=f"{kind}: {fault}")
    for kind, faults in PLANTED.items()
    for fault, subject, law in faults
]


@pytest.mark.usefixtures("first_cases")
@pytest.mark.parametrize(("kind", "subject", "law"), CASES)
def test_the_law_finds_the_fault_within_200_examples(kind, subject, law):
    with pytest.raises(
        LawBroken, match=rf"(?s)^{law}: .*\.\n.*  expected .*\n  Why it matters: "
    ) as broken:
        KINDS[kind][law].check(subject, examples=200)
    assert broken.value.law == law


def test_at_least_forty_faults_are_planted():
    assert len(CASES) >= 40


@pytest.mark.parametrize("kind", KINDS)
def test_every_law_has_a_planted_fault(kind):
    """Laws of a wider kind may have theirs in another kind that shares them."""
    planted = {law for faults in PLANTED.values() for _, _, law in faults}
    assert {law.name for law in KINDS[kind]} <= planted
