import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.pictures.chains import random_scene
from examples.pictures.drawing import CORNERS, SIGN, SIZE, draw, sprite, thing_mask
from examples.pictures.scene import PLACES, Scene
from tests.loops import some

seeds = st.integers(min_value=0, max_value=2**32)
quick = settings(max_examples=25, deadline=None)


@quick
@given(seeds)
def test_a_scene_without_a_thing_differs_in_the_thing_s_pixels_alone(seed):
    scene = random_scene(random.Random(seed))
    whole = draw(scene).astype(int)
    for thing in some(scene.things):
        others = tuple(other for other in scene.things if other != thing)
        without = draw(Scene(scene.background, scene.text, others)).astype(int)
        changed = abs(whole - without).max(axis=-1) > 0
        assert not (changed & (sprite(thing)[..., 3] == 0)).any()
        assert changed.sum() > 0.5 * thing_mask(thing).sum()


@quick
@given(seeds)
def test_things_stay_in_their_places_and_off_the_sign(seed):
    for thing in some(random_scene(random.Random(seed)).things):
        rows, columns = np.nonzero(thing_mask(thing))
        left, top = CORNERS[thing.place]
        assert top - 2 <= rows.min() <= rows.max() <= top + 26
        assert left - 1 <= columns.min() <= columns.max() <= left + 26
        assert rows.max() < SIGN[1]


def test_a_picture_is_drawn_alike_each_time_and_is_8_bit():
    scene = random_scene(random.Random(3))
    picture = draw(scene)
    assert picture.shape == (SIZE, SIZE, 3)
    assert picture.dtype == np.uint8
    assert (picture == draw(scene)).all()
    assert set(CORNERS) == set(PLACES)


def test_two_things_of_a_pair_are_equal():
    for seed in range(40):
        thing = random_scene(random.Random(seed)).things[0]
        if thing.count == "two" and thing.material == "plain":
            left = CORNERS[thing.place][0]
            alpha = sprite(thing)[..., 3]
            halves = alpha[:, left : left + 12].sum(), alpha[:, left + 13 : left + 25].sum()
            assert abs(halves[0] - halves[1]) < 0.1 * halves[0]
            return
    raise AssertionError("no pair was drawn")
