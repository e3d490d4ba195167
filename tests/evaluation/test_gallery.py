"""The gallery page: what it holds, and in a real browser what it shows and hides."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.evaluation.gallery import Series, gallery
from tests.samples_of_scores import evaluation, nan

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
TYPES = (("subject_add", "color_alter"), ("color_alter", "subject_add"), ("text_change",) * 2)


@pytest.fixture(scope="module")
def page():
    """Chain 0 fails at turn 2, chain 1 at none, chain 2 at turn 1 and lost turn 2."""
    found = evaluation([[1, 0], [1, 1], [0, nan]], lost=[(2, 1)])
    chains = [
        Chain(id=f"</script>{i}", image="x.png", instructions=("<b>a", "b"), task_types=TYPES[i])
        for i in range(3)
    ]
    images = {
        row: [Image.new("RGB", (400, 300), c) for c in ("red", "blue", "green")] for row in range(3)
    }
    return gallery([Series("mine & yours", found, images)], chains, range(3), title="<i>{{data}}")


def held(page):
    return json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])


def test_the_page_holds_everything_and_loads_nothing(page):
    data = held(page)
    assert [chain["id"] for chain in data["chains"]] == [f"</script>{i}" for i in range(3)]
    turns = [[turn["followed"] for turn in chain["series"][0]["turns"]] for chain in data["chains"]]
    assert turns == [[True, False], [True, True], [False, None]]
    assert "time-out" in data["chains"][2]["series"][0]["turns"][1]["lost"][0]
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page)
    assert "<title>&lt;i&gt;{{data}}</title>" in page
    assert "grid-auto-flow: column" not in page  # twenty turns take several rows


def test_nothing_to_measure_is_shown_apart_from_what_was_lost_with_the_denominators():
    found = evaluation([[1, nan]], [[0.5, nan]], lost=[(0, 1)])
    chain = Chain(id="c0", image="x.png", instructions=("a", "b"))
    images = {0: [Image.new("RGB", (8, 8))] * 3}
    data = held(gallery([Series("mine", found, images)], [chain], [0], title="x"))
    second = data["chains"][0]["series"][0]["turns"][1]
    assert second["scores"] == {"following": None, "consistency": "not measured"}
    assert len(second["lost"]) == 1
    assert data["denominators"] == [
        "mine: chains by turn: instruction following 1 / 0, marginal 1 / 0, content consistency "
        "1 / 0, overall 1 / 0; 1 lost a score; turns with nothing to measure: consistency 1"
    ]


def amplitude(cycles):
    """Amplitude on the page, of 100, of a wave of so many cycles per pixel of the halved image."""
    wave = 128 + 100 * np.sin(np.pi * cycles * (np.arange(512) + 0.5))
    image = Image.fromarray(np.tile(wave.round().astype(np.uint8), (512, 1))).convert("RGB")
    chain = Chain(id="c0", image="x.png", instructions=("a",))
    page = gallery([Series("x", evaluation([[1]]), {0: [image] * 2})], [chain], [0], title="x")
    address = held(page)["chains"][0]["reference"]
    shown = Image.open(io.BytesIO(base64.b64decode(address.partition("base64,")[2])))
    assert (shown.format, shown.size) == ("WEBP", (256, 256))
    return 2**0.5 * np.asarray(shown.convert("L"), dtype=float)[:, 20:-20].std()


def test_large_images_are_shrunk_sharp_and_without_moire():
    """Half a cycle per pixel is the finest that fits. Lanczos: 99.8 and 0; bicubic: 88 and 11."""
    assert amplitude(0.3) > 95
    assert amplitude(0.7) < 3


def test_images_that_are_not_one_more_than_the_turns_are_refused():
    images = {0: [Image.new("RGB", (8, 8))]}
    chain = Chain(id="c0", image="x.png", instructions=("a",))
    with pytest.raises(ValueError, match="chain 'c0': expected 1 after the reference, got 0"):
        gallery([Series("x", evaluation([[1]]), images)], [chain], [0], title="x")
    with pytest.raises(ValueError, match="series: expected at least one"):
        gallery([], [chain], [0], title="x")


def browsed(folder, page, address):
    """The page as a browser has it."""
    file = folder / "gallery.html"
    file.write_text(page)
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/b",
    ]
    found = subprocess.run(
        [*command, "--dump-dom", f"{file.as_uri()}#{address}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return found.stdout


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine (Debian: chromium)")
@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("", [0, 1, 2]),
        ("failed=2", [0]),
        ("failed=any", [0, 2]),
        ("failed=none", [1]),
        ("type=color_alter", [0, 1]),
        ("type=color_alter&failed=2", [0]),
        ("type=subject_add&failed=any", []),
        ("type=nothing&failed=9", [0, 1, 2]),
    ],
)
def test_a_browser_shows_what_the_address_asks_for(page, tmp_path, address, shown):
    dom = browsed(tmp_path, page, address)
    articles = re.findall(r"<article[^>]*>", dom)
    assert len(articles) == 3
    assert [i for i, x in enumerate(articles) if "hidden" not in x] == shown
    assert f"{len(shown)} of 3 chains" in dom
    assert "&lt;b&gt;a" in dom.replace("<b>1. ✓ followed</b>", "")


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine (Debian: chromium)")
def test_keys_move_between_chains_that_are_shown(page, tmp_path):
    """With failures alone: the first, the next, the last again, back; then all."""
    keys = """<script>
      const seen = [];
      for (const key of ["j", "j", "j", "k", "f", "Escape"]) {
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        seen.push(document.activeElement.ariaLabel ?? document.activeElement.id);
      }
      document.title = JSON.stringify([seen.map(x => x.at(-1)), document.getElementById("count").textContent]);
    </script>"""  # noqa: E501
    dom = browsed(tmp_path, page + keys, "failed=any")
    title = re.search("<title>(.*)</title>", dom)[1]
    assert json.loads(title) == [["0", "2", "2", "0", "d", "d"], "3 of 3 chains"]
