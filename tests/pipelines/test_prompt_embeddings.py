from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mteditflow.pipelines import FAMILIES, Prompts
from mteditflow.pipelines.prompts import working_on
from tests.loops import some


class Encoder(nn.Module):
    """Remembers what it was asked, one instruction at a time."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.asked = []

    def forward(self, text):
        self.asked.append(text)
        return [torch.full((1, 3), float(len(text))) * self.scale, self.scale * torch.ones(1, 1)]


@pytest.fixture
def encoder():
    return Encoder()


def prompts(encoder, capacity=10):
    return Prompts(encoder, [encoder], "cpu", capacity=capacity)


def test_each_instruction_is_embedded_once_and_alone(encoder):
    look_up = prompts(encoder)
    first = look_up(["Add a cat", "Remove it", "Add a cat"])
    again = look_up(["Remove it", "Zoom"])
    assert encoder.asked == ["Add a cat", "Remove it", "Zoom"]
    assert list(first) == ["Add a cat", "Remove it"]
    assert torch.equal(first["Add a cat"][0], torch.full((1, 3), 18.0))
    assert torch.equal(first["Add a cat"][1], torch.tensor([[2.0]]))
    assert again["Remove it"] is first["Remove it"]


def test_embeddings_need_no_gradient(encoder):
    assert not any(x.requires_grad for x in some(prompts(encoder)(["Zoom"])["Zoom"]))


def test_the_least_recently_used_is_forgotten(encoder):
    look_up = prompts(encoder, capacity=2)
    look_up(["a", "b"])
    look_up(["a"])
    look_up(["c"])  # b was used longest ago
    look_up(["a", "c"])
    assert encoder.asked == ["a", "b", "c"]
    look_up(["b"])
    assert encoder.asked == ["a", "b", "c", "b"]


def test_a_request_may_be_larger_than_the_cache(encoder):
    look_up = prompts(encoder, capacity=2)
    texts = ["a", "bb", "ccc", "dddd"]
    found = look_up(texts)
    assert [found[text][0][0, 0].item() for text in texts] == [2.0, 4.0, 6.0, 8.0]
    look_up(["ccc", "dddd"])
    assert encoder.asked == texts


def test_encoders_come_home_the_very_tensors_they_were(encoder):
    home = encoder.scale.data_ptr()

    def interrupted():
        with working_on([encoder], torch.device("cpu")):
            encoder.scale.data = torch.tensor(9.0)  # what a move to a device does
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert encoder.scale.data_ptr() == home
    assert encoder.scale.item() == 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_encoders_are_on_the_device_only_while_they_work(encoder):
    places = []

    def encode(text):
        places.append(encoder.scale.device.type)
        return encoder(text)

    found = Prompts(encode, [encoder], "cuda", capacity=1)(["Zoom"])
    assert places == ["cuda"]
    assert encoder.scale.device.type == "cpu"
    assert all(x.device.type == "cpu" for x in some(found["Zoom"]))


def test_a_cache_without_room_is_refused(encoder):
    with pytest.raises(ValueError, match="capacity: expected an integer >= 1, got 0"):
        prompts(encoder, capacity=0)


@pytest.mark.parametrize(
    ("scale", "distilled", "negative"), [(4.0, False, ""), (1.0, False, None), (4.0, True, None)]
)
def test_klein_embeds_a_negative_prompt_only_where_it_is_guided_by_it(scale, distilled, negative):
    (klein,) = [family for family in FAMILIES if family.name == "klein"]
    pipeline = SimpleNamespace(config=SimpleNamespace(is_distilled=distilled))
    assert klein.negative_prompt(pipeline, {"guidance_scale": scale}) == negative
