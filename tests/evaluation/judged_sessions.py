"""Sessions whose images' red says what a judge answers about them."""

import json

from mteditflow.testing.endpoint import completion
from tests.evaluation.judged_items import criteria_of, save, values_of


def write_sessions(folder, marks, **extra):
    """Write sessions in the native format; ``marks`` maps an id to the red of each turn's image.

    The source has red 0.
    """
    records = []
    for name, reds in marks.items():
        instructions = [f"Edit {name} {n}" for n in range(1, len(reds) + 1)]
        own = {key: value[: len(reds)] for key, value in extra.items()}
        records.append(
            {"id": name, "image": f"images/{name}.png", "instructions": instructions, **own}
        )
        pictures = {f"images/{name}.png": 0}
        pictures |= {f"made/{name}/turn{n}.png": red for n, red in enumerate(reds, start=1)}
        save(folder, pictures)
    path = folder / "sessions.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def judging(rate):
    """A judge: ``rate`` maps the red of each image shown and a criterion's name to a number."""

    def answer(request):
        if "response_format" not in request:
            return completion("ok")
        reds = values_of(request)
        scores = {name: rate(reds, name) for name in criteria_of(request)}
        return completion(json.dumps({"analysis": "As seen.", **scores}))

    return answer
