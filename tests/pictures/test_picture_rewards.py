import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from examples.pictures.chains import Chain, make_chains, no_change_chains
from examples.pictures.drawing import draw
from examples.pictures.rewards import RIGHT, Truth, lenient_following, score, score_neighbors
from examples.pictures.scene import possible_edits
from examples.pictures.scoring import (
    TERMS,
    BoxedRewards,
    CarefulJudge,
    ExactRewards,
    HastyJudge,
    NeighborRewards,
    record_of,
)
from tests.loops import some

CHAINS = make_chains(12, turns=4, seed=11, split="held_out")


def drawn(scenes):
    return torch.from_numpy(np.stack([draw(s) for s in scenes])).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("look", [score, score_neighbors])
def test_perfect_edits_earn_everything(look):
    for chain in some(CHAINS):
        scores = look(drawn(chain.scenes[1:]), Truth.of(chain))
        assert (scores.following == 5).all()
        assert (scores.strict == 1).all()
        assert (scores.consistency.nan_to_num(1.0) > 0.99).all()
        assert (scores.wear.nan_to_num(0.0) < 0.001).all()


@pytest.mark.parametrize("look", [score, score_neighbors])
def test_an_editor_that_does_nothing_follows_nothing(look):
    for chain in some(CHAINS):
        idle = drawn(chain.scenes[:1]).expand(4, -1, -1, -1)
        scores = look(idle, Truth.of(chain))
        assert scores.following[0] == 1
        assert scores.strict[0] == 0
        assert scores.consistency[0].nan_to_num(1.0) > 0.99


def test_wear_is_the_shift_of_what_must_not_change():
    chain = no_change_chains(1, turns=3, seed=0, split="held_out")[0]
    shift = torch.tensor([0.01, 0.02, 0.04])[:, None, None, None]
    picture = drawn(chain.scenes[1:]) * 0.9
    truth = Truth.of(chain)
    darker = replace(truth, pictures=truth.pictures * 0.9)
    exact = score(picture + shift, darker)
    assert exact.wear == pytest.approx(torch.tensor([0.01, 0.02, 0.04]), abs=1e-6)
    assert exact.consistency == pytest.approx(1 - exact.wear / 0.15, abs=1e-6)
    assert (exact.following == 5).all()
    neighbors = score_neighbors(picture + shift, darker)  # sees the last step alone
    assert neighbors.wear.isnan().all()  # all pixels are asked about


def test_neighbors_do_not_see_what_an_earlier_turn_ruined():
    chain = next(
        chain
        for chain in make_chains(200, turns=2, seed=2, split="train")
        if [edit.task_type for edit in chain.edits] == ["text_change", "color_alter"]
    )
    picture = drawn(chain.scenes[1:])
    without_text = drawn([chain.scenes[0]])[0]
    sign = (picture[0] - without_text).abs().amax(dim=0) > 0.03
    ruined = torch.where(sign, without_text, picture)  # the text was never written
    exact, neighbors = (look(ruined, Truth.of(chain)) for look in (score, score_neighbors))
    assert exact.following[0] == neighbors.following[0] == 1
    assert exact.following[1] == neighbors.following[1] == 5  # its own pixels are right
    assert exact.strict[1] == 0
    assert neighbors.strict[1] == 1


def test_a_neighbor_passes_the_right_change_of_a_wrong_thing():
    chain = next(
        chain
        for chain in make_chains(300, turns=1, seed=8, split="train")
        if chain.edits[0].task_type == "background_change"
    )
    second = next(e for e in possible_edits(chain.scenes[1]) if e.task_type == "text_change")
    both = Chain(chain.initial, (chain.edits[0], second))
    pictures = drawn(both.scenes[1:])
    darker = pictures - 0.1
    exact, neighbors = (look(darker, Truth.of(both)) for look in (score, score_neighbors))
    assert exact.following[1] < 5
    assert neighbors.following[1] == 5
    assert neighbors.consistency[1] > 0.9


def test_scores_agree_with_a_loop_in_float64():
    rng = np.random.default_rng(0)
    chain = CHAINS[3]
    made = np.clip(
        np.stack([draw(s) for s in chain.scenes[1:]]) / 255 + rng.normal(0, 0.09, (4, 64, 64, 3)),
        0,
        1,
    )
    scores = score(torch.from_numpy(made).permute(0, 3, 1, 2).float(), Truth.of(chain))
    truth = Truth.of(chain)
    for n in range(4):
        before, after = (draw(chain.scenes[k]) / 255 for k in (n, n + 1))
        own = idle = count = worn = kept = off = about = 0.0
        for y in range(64):
            for x in range(64):
                error = abs(made[n, y, x] - after[y, x]).mean()
                if truth.target[n, y, x]:
                    off += error
                    about += 1
                if truth.changed[n, y, x]:
                    own += error
                    idle += abs(before[y, x] - after[y, x]).mean()
                    count += 1
                if truth.kept[n, y, x]:
                    worn += error
                    kept += 1
        share = (own / count) / min(idle / count, 0.15)
        points = 1 + sum(share < step for step in (0.95, 0.85, 0.7, 0.6))
        assert scores.following[n] == (4 if points == 5 and off / about > RIGHT else points)
        assert float(scores.wear[n]) == pytest.approx(worn / kept, rel=1e-5)


def test_what_a_turn_touches_is_never_kept_again():
    for chain in some(CHAINS):
        kept = Truth.of(chain).kept
        assert not (kept[1:] & ~kept[:-1]).any()
        assert kept.flatten(1).any(dim=1).all()


def test_a_scorer_pads_shorter_chains_and_reads_the_scene_of_the_record():
    chains = [CHAINS[0], CHAINS[1]]
    images = [[Image.fromarray(draw(s)) for s in chain.scenes] for chain in chains]
    records = [record_of(chain) for chain in chains]
    terms = asyncio.run(ExactRewards().score(records, [images[0], images[1][:3]]))
    assert set(terms) == set(TERMS)
    assert terms["following"].turn_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert (terms["following"].score[1, :2] == 5).all()
    assert terms["following"].score[1, 2:].isnan().all()
    assert asyncio.run(NeighborRewards().score([records[0]], images[:1]))[
        "strict"
    ].score.tolist() == [[1.0] * 4]


def test_bad_input_is_refused():
    record = record_of(CHAINS[0])
    images = [Image.fromarray(draw(s)) for s in CHAINS[0].scenes]
    plain = record.model_copy(update={"scene": None})
    with pytest.raises(ValueError, match="expected the field 'scene', got none"):
        asyncio.run(ExactRewards().score([plain], [images]))
    small = [image.resize((32, 32)) for image in images]
    with pytest.raises(ValueError, match="images: expected shape"):
        asyncio.run(ExactRewards().score([record], [small]))


def test_a_lenient_look_passes_a_blurred_edit_and_most_that_do_nothing_fail():
    blurred = idle = exact = 0
    for chain in some(CHAINS):
        truth, pictures = Truth.of(chain), drawn(chain.scenes[1:])
        soft = avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)
        assert (lenient_following(pictures, truth) == 5).all()
        blurred += (lenient_following(soft, truth) == 5).sum()
        exact += (score(soft, truth).following == 5).sum()
        idle += lenient_following(drawn(chain.scenes[:1]), truth)[0] > 3
    assert blurred > exact + 8
    assert idle <= 6  # some materials and texts look alike to it


def test_judges_err_alike_whenever_they_see_the_same_picture():
    records = [record_of(chain) for chain in CHAINS]
    images = [[Image.fromarray(draw(s)) for s in chain.scenes] for chain in CHAINS]
    careful, hasty = (
        asyncio.run(judge().score(records, images)) for judge in (CarefulJudge, HastyJudge)
    )
    again = asyncio.run(CarefulJudge().score(records[:2], images[:2]))
    assert torch.equal(careful["following"].score[:2], again["following"].score)
    assert 0.2 < (careful["following"].score < 5).float().mean() < 0.8
    assert (hasty["following"].score < 5).float().mean() < 0.1
    assert (careful["strict"].score == 1).all()


def test_consecutive_is_blind_to_what_earlier_turns_have_done():
    chain = no_change_chains(1, turns=2, seed=0, split="held_out")[0]
    shifted = replace(chain.edits[0], task_type="text_change")  # so that something must stay
    truth = Truth.of(Chain(chain.initial, (shifted, shifted)))
    worn = (drawn(chain.scenes[1:]) + 0.03).clamp(max=1.0)
    scores = score(worn, truth)
    assert scores.consecutive[0] == scores.consistency[0] < 0.9
    assert scores.consecutive[1] == 1
    assert scores.consistency[1] == scores.consistency[0]


def test_a_scene_that_is_not_in_the_picture_is_refused_by_the_chain_s_name():
    record, images = record_of(CHAINS[0]), [Image.fromarray(draw(s)) for s in CHAINS[1].scenes]
    with pytest.raises(ValueError, match=f"chain {record.id}: expected the picture of its scene"):
        asyncio.run(ExactRewards().score([record], [images]))
    for scene in ("meadow", {"background": "moon", "text": "", "things": []}):
        broken = record.model_copy(update={"scene": scene})
        with pytest.raises(ValueError, match=f"chain {record.id}: scene: expected"):
            asyncio.run(ExactRewards().score([broken], [images]))


def test_a_judge_of_neighbors_has_one_consistency():
    record, images = record_of(CHAINS[0]), [Image.fromarray(draw(s)) for s in CHAINS[0].scenes]
    terms = asyncio.run(NeighborRewards().score([record], [images]))
    assert terms["consecutive"].score.isnan().all()
    assert terms["consecutive"].lost == {}


def test_regions_are_masks_or_the_box_around_each():
    chains = [CHAINS[0], replace(CHAINS[1], edits=CHAINS[1].edits[:2])]
    images = [[Image.new("RGB", (64, 64))] * (len(chain.edits) + 1) for chain in chains]
    records = [record_of(chain) for chain in chains]
    found, boxes = (
        asyncio.run(scorer().regions(records, images)) for scorer in (ExactRewards, BoxedRewards)
    )
    for b, chain in some(enumerate(chains)):
        truth, turns = Truth.of(chain), len(chain.edits)
        assert torch.equal(found["following"][b, :turns].bool(), truth.target)
        assert torch.equal(found["consistency"][b, :turns].bool(), truth.kept)
        assert torch.equal(found["consecutive"][b, :turns].bool(), ~truth.target)
        assert not found["consecutive"][b, turns:].any()
        for mask, box in some(zip(truth.target, boxes["following"][b], strict=False)):
            places, expected = mask.nonzero(), torch.zeros_like(mask)
            (top, left), (bottom, right) = places.amin(0).tolist(), places.amax(0).tolist()
            expected[top : bottom + 1, left : right + 1] = True
            assert torch.equal(box.bool(), expected)
    assert (boxes["consistency"] <= found["consistency"]).all()
