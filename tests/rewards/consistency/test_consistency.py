"""Content consistency: closed forms, the float64 reference, every edge case, batches of chains."""

import hashlib
import math

import numpy as np
import pytest
import torch
from consistency_reference import HashedFeatures, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.rewards import (
    Consistency,
    ConsistencyScorer,
    Features,
    Pair,
    PairScores,
    pairs_of,
)
from mteditflow.rewards.consistency.regions import clean_names
from tests.loops import some

BOTH = pytest.mark.parametrize("tokens", ["strict", "compat"])
LEFT = [0.0, 0.0, 256.0, 512.0]  # 7 of 14 columns of patches
ALL = [0.0, 0.0, 512.0, 512.0]


def color(*rgb, size=(512, 512)):
    return Image.new("RGB", size, rgb)


def noise(seed, size=(512, 512)):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))


class FixedDetector:
    """Finds the same boxes for given names in every image, and counts its calls."""

    def __init__(self, boxes, spoil=None):
        self.boxes, self.calls, self.spoil = boxes, [], spoil

    def __call__(self, images, names):
        assert len({image.shape for image in images}) == 1
        self.calls.append([tuple(each) for each in names])
        found = [torch.tensor(self.boxes.get(tuple(each), [])).view(-1, 4) for each in names]
        return self.spoil(found) if self.spoil else found


class MapFeatures:
    """Hand-made tokens: those of the source for images that begin black, else the edited ones."""

    def __init__(self, source, edited, registers=4):
        self.maps, self.registers = (source, edited), registers

    def __call__(self, images):
        tokens = torch.stack([self.maps[int(image[0, 0, 0] > 0)] for image in images])
        first = 1 + self.registers
        return Features(
            tokens[:, 0], tokens[:, 1:first], tokens[:, first:], (14, 14), (224, 224)
        )  # fmt: skip


def score(images, pair, boxes, features=None, tokens="strict"):
    scorer = ConsistencyScorer(FixedDetector(boxes), features, tokens=tokens)
    return scorer.score_pairs(images, [pair])[0]


def pair_of(unchanged=(), everything=(), background=True):
    return Pair(
        source=0,
        edited=1,
        unchanged_objects=unchanged,
        all_objects=everything,
        background=background,
    )


BLACK_GRAY = [color(0, 0, 0), color(51, 51, 51)]


# -- closed forms ---------------------------------------------------------------------------------


@BOTH
def test_object_term_of_hand_made_features(tokens):
    """0.5 cos(CLS) + 0.5 cos(mean): registers are in the mean only in compat.

    CLS: cos((1, 0), (3, 4)) = 0.6. Patches: all (0, 1) against half (0, 2), half (2, 0): mean
    (1, 1), cosine 1/sqrt 2. Registers, 4 of 200 tokens: (98, 0) against (0, 49), so that the sums
    of compat are (392, 196) and (196, 196 + 196), of cosine 0.8.
    """
    source, edited = torch.zeros(201, 2), torch.zeros(201, 2)
    source[0], edited[0] = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
    source[1:5, 0], edited[1:5, 1] = 98.0, 49.0
    source[5:, 1] = 1.0
    edited[5:103, 1] = edited[103:, 0] = 2.0
    texture = {"strict": 1 / math.sqrt(2), "compat": 0.8}[tokens]
    expected = 0.5 * 0.6 + 0.5 * texture
    found = score(
        BLACK_GRAY, pair_of(("a",)), {("a",): [LEFT]}, MapFeatures(source, edited), tokens
    )
    assert found.object == pytest.approx(expected, abs=1e-6)
    assert found.object_l1 == 0.8
    assert (found.background, found.background_l1) == (None, None)


def test_background_term_of_hand_made_features():
    """The right half counts: all e1 against a half each of e1 and e2, so cos = 1/sqrt 2.

    Lengths of tokens do not matter, and neither does anything on the left or in the registers.
    """
    source, edited = torch.zeros(201, 3), torch.zeros(201, 3)
    source[1:5, 2] = 1e3
    rows, columns = torch.arange(196) // 14, torch.arange(196) % 14
    source[5:, 0] = 1 + rows
    source[5:][columns < 7] = torch.tensor([0.0, 0.0, 5.0])
    edited[5:][rows < 7] = torch.tensor([100.0, 0.0, 0.0])
    edited[5:][rows >= 7] = torch.tensor([0.0, 0.1, 0.0])
    edited[5:][columns < 7] = torch.tensor([-9.0, -9.0, -9.0])
    features = MapFeatures(source, edited)
    found = score(BLACK_GRAY, pair_of((), ("a",)), {("a",): [LEFT]}, features)
    assert found.background == pytest.approx(1 / math.sqrt(2), abs=1e-6)
    assert found.background_l1 == 0.8
    assert (found.object, found.object_l1) == (None, None)


def test_background_term_of_hand_made_features_in_compat():
    """200 tokens in 10 rows of 20: the last 10 of each row count, wherever they are in truth.

    The first 4 tokens are registers. In the counted part, 60 tokens are e1 and 40 are e2, against
    all e1: the cosine is 60 / hypot(60, 40).
    """
    source, edited = torch.zeros(201, 2), torch.zeros(201, 2)
    row, column = torch.arange(200) // 20, torch.arange(200) % 20
    source[1:, 0] = 1.0
    edited[1:, 0] = torch.where(row < 6, 1.0, 0.0)
    edited[1:, 1] = torch.where(row < 6, 0.0, 1.0)
    edited[1:][column < 10] = torch.tensor([-3.0, 2.0])
    features = MapFeatures(source, edited)
    found = score(BLACK_GRAY, pair_of((), ("a",)), {("a",): [LEFT]}, features, "compat")
    assert found.background == pytest.approx(60 / math.hypot(60, 40), abs=1e-6)
    strict = score(BLACK_GRAY, pair_of((), ("a",)), {("a",): [LEFT]}, features, "strict")
    assert abs(strict.background - found.background) > 0.01


def test_soft_weights_enter_the_mean():
    """A box of 128 x 512 pixels: 3.5 columns of 36.57 pixels, so that column 3 weighs one half.

    Columns 3 and 4 alone have a direction of their own: (0.5 + 1) * 14 of 10.5 * 14 are e2.
    """
    source, edited = torch.zeros(201, 2), torch.zeros(201, 2)
    column = torch.arange(196) % 14
    source[5:, 0] = 1.0
    edited[5:][:, 0] = torch.where((column == 3) | (column == 4), 0.0, 1.0)
    edited[5:][:, 1] = torch.where((column == 3) | (column == 4), 1.0, 0.0)
    box = [0.0, 0.0, 128.0, 512.0]
    found = score(BLACK_GRAY, pair_of((), ("a",)), {("a",): [box]}, MapFeatures(source, edited))
    assert found.background == pytest.approx(9 / math.hypot(9, 1.5), abs=1e-6)


def test_opposite_features_give_minus_one_and_nothing_is_clamped():
    tokens = torch.randn(201, 5, generator=torch.Generator().manual_seed(0))
    pair = pair_of(("a",), ("a",))
    found = score(BLACK_GRAY, pair, {("a",): [LEFT]}, MapFeatures(tokens, -tokens))
    assert found.object == pytest.approx(-1, abs=1e-6)
    assert found.background == pytest.approx(-1, abs=1e-6)


@BOTH
def test_terms_of_several_boxes_are_averaged(tokens):
    """The objects' pixels differ by 0, 51 and 255 of 255."""
    source, edited = color(0, 0, 0), color(0, 0, 0)
    edited.paste((51, 51, 51), (100, 0, 200, 100))
    edited.paste((255, 255, 255), (200, 0, 300, 100))
    boxes = [[0.0, 0, 100, 100], [100.0, 0, 200, 100], [200.0, 0, 300, 100]]
    features, pair = HashedFeatures(), pair_of(("a",))
    found = score([source, edited], pair, {("a",): boxes}, features, tokens)
    assert found.object_l1 == pytest.approx((1 + 0.8 + 0) / 3)
    each = [score([source, edited], pair, {("a",): [box]}, features, tokens) for box in boxes]
    assert found.object == pytest.approx(sum(x.object for x in each) / 3)
    assert len({x.object for x in each}) == 3


def test_l1_of_the_background_is_masked():
    source, edited = color(0, 0, 0), color(0, 0, 0)
    edited.paste((255, 255, 255), (0, 0, 256, 512))  # under the mask
    edited.paste((102, 0, 0), (256, 0, 512, 256))  # a half of the background, one channel of three
    found = score([source, edited], pair_of((), ("a",)), {("a",): [LEFT]})
    assert found.background_l1 == pytest.approx(1 - 0.4 / 3 / 2)


# -- the reference --------------------------------------------------------------------------------

coordinate = st.one_of(
    st.floats(-60, 580, width=32), st.sampled_from([0.0, 256.0, 512.0, torch.nan, torch.inf])
)
wild = st.tuples(*[coordinate] * 4).map(list)
corner, side = st.floats(-20, 400, width=32), st.floats(20, 300, width=32)
plain = st.tuples(corner, corner, side, side).map(lambda b: [*b[:2], b[0] + b[2], b[1] + b[3]])
some_boxes = st.lists(st.one_of(plain, wild), max_size=3)
some_names = st.lists(st.sampled_from(["cat", "dog", "red ball"]), max_size=2, unique=True)


@BOTH
@settings(max_examples=30)
@given(
    data=st.data(),
    unchanged=some_names,
    everything=some_names,
    background=st.booleans(),
    grid=st.sampled_from([((14, 14), (224, 224)), ((14, 28), (224, 448)), ((3, 5), (48, 80))]),
    registers=st.sampled_from([0, 4]),
)
def test_equals_the_independent_reference(
    tokens, data, unchanged, everything, background, grid, registers
):
    """Random boxes in each image for each set of names, random features of any grid."""
    images = [noise(0), noise(1)]
    drawn = {}

    def find(image, names):
        key = (hashlib.sha256(image).hexdigest(), tuple(names))
        if key not in drawn:
            drawn[key] = data.draw(some_boxes)
        return drawn[key]

    def detector(pictures, names):
        found = [
            find(x.permute(1, 2, 0).numpy().tobytes(), n)
            for x, n in zip(pictures, names, strict=True)
        ]
        return [torch.tensor(boxes, dtype=torch.float64).view(-1, 4) for boxes in found]

    pair = pair_of(tuple(unchanged), tuple(everything), background)
    features = HashedFeatures(registers=registers, grid=grid[0], size=grid[1])
    found = ConsistencyScorer(detector, features, tokens=tokens).score_pairs(images, [pair])[0]
    expected = reference(
        *images, pair, lambda image, names: find(image.tobytes(), names), features, tokens
    )
    assert found.model_dump() == {
        name: None if value is None else pytest.approx(value, abs=1e-9)
        for name, value in expected.items()
    }


@BOTH
def test_images_of_any_mode_and_size_are_compared_at_512(tokens):
    images = [noise(3, (90, 70)).convert("RGBA"), noise(4, (700, 900)).convert("P")]
    pair = pair_of(("a",), ("b",))
    boxes = {("a",): [[3.7, 10, 200, 300]], ("b",): [LEFT]}
    features = HashedFeatures()
    found = score(images, pair, boxes, features, tokens)
    expected = reference(*images, pair, lambda _, names: boxes[names], features, tokens)
    assert found.model_dump() == {k: pytest.approx(v, abs=1e-9) for k, v in expected.items()}


# -- the table of edge cases ----------------------------------------------------------------------


@BOTH
def test_unchanged_objects_empty_gives_no_object_term(tokens):
    found = score(BLACK_GRAY, pair_of((), ("a",)), {("a",): [LEFT]}, HashedFeatures(), tokens)
    assert (found.object, found.object_l1) == (None, None)
    assert found.background is not None


@pytest.mark.parametrize(("tokens", "expected"), [("strict", None), ("compat", 0.0)])
def test_unchanged_objects_not_found(tokens, expected):
    found = score(BLACK_GRAY, pair_of(("a",), ("b",)), {}, HashedFeatures(), tokens)
    assert (found.object, found.object_l1) == (expected, expected)
    assert found.background is not None


@BOTH
def test_all_objects_empty_gives_no_background_term(tokens):
    found = score(BLACK_GRAY, pair_of(("a",), ()), {("a",): [LEFT]}, HashedFeatures(), tokens)
    assert (found.background, found.background_l1) == (None, None)
    assert found.object is not None


@BOTH
def test_all_objects_not_found_makes_the_whole_image_background(tokens):
    images = [color(0, 0, 0), color(0, 0, 0)]
    images[1].paste((255, 255, 255), (0, 0, 256, 512))
    features = HashedFeatures()
    found = score(images, pair_of((), ("a",)), {}, features, tokens)
    assert found.background_l1 == 0.5
    first = 1 if tokens == "compat" else 5
    means = []
    for image in images:
        rows = features.tokens(image)[first:]
        means.append((rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0))
    cosine = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    assert found.background == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize(("tokens", "expected"), [("strict", None), ("compat", 0.0)])
def test_everything_masked(tokens, expected):
    """No pixel is left, so that there is no L1 term either way."""
    found = score(BLACK_GRAY, pair_of((), ("a",)), {("a",): [ALL]}, HashedFeatures(), tokens)
    assert (found.background, found.background_l1) == (expected, None)


@pytest.mark.parametrize(("tokens", "expected"), [("strict", None), ("compat", 0.0)])
def test_every_patch_masked_but_not_every_pixel(tokens, expected):
    """Less than half of each patch is left: pixels can be compared, patches cannot."""
    boxes = [[512 / 14 * n, 0.0, 512 / 14 * n + 30, 512.0] for n in range(14)]
    found = score(BLACK_GRAY, pair_of((), ("a",)), {("a",): boxes}, HashedFeatures(), tokens)
    if tokens == "compat":  # its patches are others
        boxes = [[512 / 20 * n, 0.0, 512 / 20 * n + 20, 512.0] for n in range(20)]
        found = score(BLACK_GRAY, pair_of((), ("a",)), {("a",): boxes}, HashedFeatures(), tokens)
    assert (found.background, found.background_l1) == (expected, 0.8)


@BOTH
def test_background_changed_by_an_instruction(tokens):
    """Strict: the object term alone. The public scorer has no consistency at all then."""
    detector = FixedDetector({("a",): [LEFT]})
    scorer = ConsistencyScorer(detector, HashedFeatures(), tokens=tokens)
    (found,) = scorer.score_pairs(BLACK_GRAY, [pair_of(("a",), ("b",), background=False)])
    assert (found.background, found.background_l1) == (None, None)
    assert (found.object is None) == (found.object_l1 is None) == (tokens == "compat")
    assert detector.calls == ([] if tokens == "compat" else [[("a",)]])


@BOTH
def test_no_term_at_all_is_unmeasured_for_that_turn_alone(tokens):
    chain = chain_of(unchanged=[("a",), ()], everything=[(), ()])
    nothing = chain_of(unchanged=[(), ()], everything=[(), ()])
    scorer = ConsistencyScorer(FixedDetector({("a",): [LEFT]}), HashedFeatures(), tokens=tokens)
    images = [[*BLACK_GRAY, BLACK_GRAY[1]]] * 2
    found = Consistency(scorer).score([chain, nothing], images)
    for scores in (found.scores, found.l1_scores):
        assert scores.measured.tolist() == [[True, False], [False, False]]
        assert scores.valid.tolist() == [True, True]
        assert scores.unmeasured.tolist() == [[False, True], [True, True]]
        assert (scores.reasons, scores.lost) == ({}, {})


@BOTH
@pytest.mark.parametrize(
    "box",
    [
        [5.2, 5.0, 5.9, 90.0],
        [5.0, 9.0, 9.0, 9.0],
        [90.0, 9.0, 5.0, 20.0],
        [600.0, 0.0, 700.0, 10.0],
        [-50.0, -50.0, 0.0, 0.0],
        [torch.nan, 0.0, 5.0, 5.0],
        [0.0, 0.0, torch.inf, 5.0],
    ],
    ids=["no width", "no height", "turned", "right of it", "above it", "NaN", "infinite"],
)
def test_crop_of_no_area_is_dropped(tokens, box):
    """Alone it is as no box; beside a good box it changes nothing."""
    pair, features = pair_of(("a",)), HashedFeatures()
    alone = score(BLACK_GRAY, pair, {("a",): [box]}, features, tokens)
    nothing = score(BLACK_GRAY, pair, {}, features, tokens)
    assert alone == nothing
    beside = score(BLACK_GRAY, pair, {("a",): [box, LEFT]}, features, tokens)
    assert beside == score(BLACK_GRAY, pair, {("a",): [LEFT]}, features, tokens)


@BOTH
def test_without_features_only_pixels_are_compared(tokens):
    found = score(BLACK_GRAY, pair_of(("a",), ("b",)), {("a",): [LEFT]}, None, tokens)
    assert found == PairScores(object_l1=0.8, background_l1=0.8)


# -- laws -----------------------------------------------------------------------------------------


@BOTH
def test_identical_images_score_one(tokens):
    pair = pair_of(("a",), ("b",))
    images = [noise(5), noise(5)]
    found = score(images, pair, {("a",): [LEFT]}, HashedFeatures(), tokens)
    assert list(found.model_dump().values()) == pytest.approx([1.0] * 4, abs=1e-12)


@BOTH
def test_scale_of_the_features_does_not_matter_and_swapping_the_images_neither(tokens):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(201, 5, generator=generator, dtype=torch.float64) for _ in "ab")
    pair, boxes = pair_of(("a",), ("b",)), {("a",): [LEFT], ("b",): [[30.0, 60.0, 300.0, 200.0]]}
    plain = score(BLACK_GRAY, pair, boxes, MapFeatures(a, b), tokens)
    scaled = score(BLACK_GRAY, pair, boxes, MapFeatures(3 * a, 0.01 * b), tokens)
    swapped = score(BLACK_GRAY, pair, boxes, MapFeatures(b, a), tokens)
    for name, value in some(plain.model_dump().items()):
        assert getattr(scaled, name) == pytest.approx(value, abs=1e-12)
        assert getattr(swapped, name) == pytest.approx(value, abs=1e-12)


@BOTH
def test_order_of_channels_does_not_matter(tokens):
    """Of the image for L1; of the features for the cosines."""
    images = [noise(6), noise(7)]
    turned = [Image.merge("RGB", image.split()[::-1]) for image in images]
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(201, 5, generator=generator, dtype=torch.float64) for _ in "ab"]
    pair, boxes = pair_of(("a",), ("b",)), {("a",): [LEFT]}
    plain = score(images, pair, boxes, None, tokens)
    assert score(turned, pair, boxes, None, tokens) == plain
    found = score(BLACK_GRAY, pair, boxes, MapFeatures(*maps), tokens)
    flipped = score(BLACK_GRAY, pair, boxes, MapFeatures(*(x.flip(1) for x in maps)), tokens)
    assert flipped.object == pytest.approx(found.object, abs=1e-12)
    assert flipped.background == pytest.approx(found.background, abs=1e-12)


def test_names_are_cleaned_before_they_are_searched():
    names = ["A Red. Ball", "a red ball", "", " . ", "Straße", "猫.", "traffic \n light"]
    assert clean_names(names) == ("a red ball", "straße", "猫", "traffic light")
    detector = FixedDetector({})
    pair = pair_of((" . ", ""), tuple(names))
    found = ConsistencyScorer(detector).score_pairs(BLACK_GRAY, [pair])
    assert detector.calls == [[("a red ball", "straße", "猫", "traffic light")] * 2]
    assert found[0].object_l1 is None, "names that name nothing are as none"


# -- batches of chains ----------------------------------------------------------------------------


def chain_of(unchanged, everything, name="c", **more):
    return Chain(
        id=name,
        image="x.png",
        instructions=["Do it"] * len(unchanged),
        unchanged_objects=unchanged,
        all_objects=everything,
        background_consistency=[True] * len(unchanged),
        **more,
    )


def test_what_pairs_and_chains_share_is_computed_once():
    """Two chains of one reference image, two turns each, in which the objects stay the same."""
    detector = FixedDetector({("a",): [LEFT, [3.0, 3.0, 9.0, 9.0]], ("a", "b"): [LEFT]})
    features = HashedFeatures()
    chain = chain_of([("a",)] * 2, [("a", "b")] * 2)
    images = [[noise(0), noise(1), noise(2)], [noise(0), noise(3), noise(4)]]
    scorer = ConsistencyScorer(detector, features, batch_size=4)
    Consistency(scorer).score([chain, chain], images)
    searches = [names for call in detector.calls for names in call]
    assert searches.count(("a",)) == 1, "unchanged objects in the one reference"
    assert searches.count(("a", "b")) == 5, "all objects in each of five pictures"
    assert sum(features.calls) == 5 * (1 + 2), "each picture whole, and its two crops"
    assert max(map(len, detector.calls)) == max(features.calls) == 4
    assert len(detector.calls) == 2, "calls are filled"


@BOTH
@given(order=st.permutations(range(3)), batch_size=st.integers(1, 20))
@settings(max_examples=10)
def test_alone_and_together_give_the_same(tokens, order, batch_size):
    detector = FixedDetector({("a",): [LEFT], ("b",): [[30.0, 60.0, 300.0, 200.0]]})
    work = [
        ([noise(0), noise(n)], [pair_of(("a",), ("b",)), pair_of(("b",), ())]) for n in range(3)
    ]
    scorer = ConsistencyScorer(detector, HashedFeatures(), tokens=tokens, batch_size=batch_size)
    together = scorer.score_many([work[n] for n in order])
    for n, found in some(zip(order, together, strict=True)):
        assert found == scorer.score_pairs(*work[n])


@BOTH
def test_real_models_alone_and_together_give_the_same(detector, features, tokens):
    """Measured with 24 chains of two pairs, on a CPU: no bit differs. A GPU may round otherwise."""
    pairs = [pair_of(("a cat",), ("dog", "a red ball")), pair_of(("the house",), ("sky",))]
    blocks = [noise(n, (8, 8)).resize((256, 256), Image.Resampling.NEAREST) for n in range(5)]
    work = [([blocks[0], blocks[n]], pairs[n % 2 :]) for n in range(1, 5)]
    scorer = ConsistencyScorer(detector, features, tokens=tokens)
    together = scorer.score_many(work)
    for each, found in some(zip(work, together, strict=True)):
        for alone, batched in some(zip(scorer.score_pairs(*each), found, strict=True)):
            for name, value in some(alone.model_dump().items()):
                assert value is not None
                assert getattr(batched, name) == pytest.approx(value, abs=1e-5)


def test_consistency_lays_out_chains_of_unequal_length():
    """Values of each turn land where they belong; padding is NaN and no turn."""
    gray = [color(value, value, value) for value in (0, 51, 102, 204)]
    long = chain_of([("a",)] * 3, [("a",)] * 3)
    short = chain_of([("a",)], [()])
    scorer = ConsistencyScorer(FixedDetector({("a",): [LEFT]}))
    images = [gray, [gray[0], gray[3]]]
    found = Consistency(scorer).score([long, short], images)
    assert found.turn_mask.tolist() == [[True] * 3, [True, False, False]]
    expected = torch.tensor([[0.8, 0.6, 0.2], [0.2, torch.nan, torch.nan]])
    torch.testing.assert_close(found.object_l1, expected, equal_nan=True)
    assert found.background_l1[1].isnan().all()
    assert found.object.isnan().all()
    consecutive = Consistency(scorer, pairing="consecutive").score([long, short], images)
    torch.testing.assert_close(consecutive.object_l1[0], torch.tensor([0.8, 0.8, 0.6]))
    assert [pair.source for pair in pairs_of(long, pairing="consecutive")] == [0, 1, 2]


def test_nothing_to_do_is_done():
    scorer = ConsistencyScorer(FixedDetector({}), HashedFeatures())
    assert scorer.score_many([]) == []
    assert scorer.score_many([(BLACK_GRAY, []), ([], [])]) == [[], []]


# -- what is refused ------------------------------------------------------------------------------


def test_options_and_arguments_are_checked():
    with pytest.raises(ValueError, match=r"tokens: expected one of \['strict', 'compat'\]"):
        ConsistencyScorer(FixedDetector({}), tokens="public")
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        ConsistencyScorer(FixedDetector({}), batch_size=0)
    scorer = ConsistencyScorer(FixedDetector({}))
    with pytest.raises(ValueError, match="pairing: expected one of"):
        Consistency(scorer, pairing="first")
    with pytest.raises(ValueError, match=r"pairs: expected images 0..1, got image 2"):
        scorer.score_pairs(BLACK_GRAY, [Pair(source=0, edited=2, unchanged_objects=("a",))])
    chain = chain_of([("a",)], [("a",)])
    with pytest.raises(ValueError, match=r"images: expected 2 for chain 'c', .* got 3"):
        Consistency(scorer).score([chain], [[*BLACK_GRAY, BLACK_GRAY[0]]])
    with pytest.raises(ValueError, match="images: expected one list for each of 1 chains, got 2"):
        Consistency(scorer).score([chain], [BLACK_GRAY] * 2)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda found: found[:-1], ValueError, "detector: expected boxes of 3 images, got 2"),
        (lambda found: [x[:, :3] for x in found], ValueError, r"boxes: expected shape \[K, 4\]"),
        (lambda found: [x.int() for x in found], TypeError, "boxes: expected a floating-point"),
    ],
)
def test_wrong_answers_of_a_detector_are_named(spoil, error, message):
    scorer = ConsistencyScorer(FixedDetector({("a",): [LEFT]}, spoil))
    with pytest.raises(error, match=message):
        scorer.score_pairs(BLACK_GRAY, [pair_of(("a",), ("b",))])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: f._replace(cls=f.cls * torch.nan), ValueError, "cls: expected finite tokens"),
        (lambda f: f._replace(cls=f.cls.half()), TypeError, "cls: expected float32 or float64"),
        (lambda f: f._replace(cls=f.cls[1:]), ValueError, r"cls: expected shape \[K, C\]"),
        (lambda f: f._replace(grid=(10, 20)), ValueError, r"patches: expected shape \[K, P, C\]"),
        (lambda f: f._replace(registers=f.cls), ValueError, r"registers: expected shape"),
    ],
)
def test_wrong_answers_of_features_are_named(spoil, error, message):
    inner = HashedFeatures()
    scorer = ConsistencyScorer(FixedDetector({}), lambda images: spoil(inner(images)))
    with pytest.raises(error, match=message):
        scorer.score_pairs(BLACK_GRAY, [pair_of((), ("b",))])
