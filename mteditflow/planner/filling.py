"""Slots of an edit, filled by a model: prompt, schema, and checks of the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from mteditflow.chains import TaskType
from mteditflow.chains.record import first_error
from mteditflow.planner.answers import read_json, strict_object
from mteditflow.planner.edits import EDITS, Edit, TextChange, unquoted
from mteditflow.planner.pool import Pool
from mteditflow.rewards import AnswerError, Fault

NUMBERS = (  # up to COUNT_MAX
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
    "twenty",
)

RULES: dict[TaskType, str] = {
    "subject_add": "name: a new object that fits the scene, in one to four words. position and "
    "reference: where it goes, beside which object of the list; both null if that is plain.",
    "subject_remove": "target: the object that goes.",
    "subject_replace": "target: the object that goes. name: a new object that fits in its place, "
    "in one to four words.",
    "position_change": "target: an object that can move. position and reference: its new place, "
    "where it is not now, beside another object of the list.",
    "count_change": "target: an object of which there can be more or fewer. count: another number "
    "than now, at least 1, at most 5.",
    "color_alter": "target: an object that can have another color. color: the new one, one or "
    "two words, not what it is now.",
    "material_alter": "target: an object that can be of another material. material: the new one, "
    "one or two words, not what it is now.",
    "text_change": "target and old: an object of the list and the text on it, exactly as listed. "
    "new: what it is to say instead, in at most five words.",
    "background_change": "background: the new scene behind the objects, in one to five words.",
}
TEXT_ADDED = "new: a text that suits the image, in at most five words."

PROMPT = """\
You plan one step of a chain of edits of the image above, which shows it before any edit.

Objects that are there at this point, after the edits so far:
{objects}

Edits so far, in order:
{edits}

Plan the next edit. Its type is {task}, in its fixed form: {form}
{rules}
Refer to objects by their names in the list, letter for letter. A new object gets a name that is \
none of: {names}. The edit must be possible at this point and plain to see.

Answer with JSON alone, of this form: {{"edit": {{{slots}}}, "instruction": "..."}}
instruction: the edit in one sentence, the way a person would ask for it, with the words of \
{mentioned} as they stand in the slots, without square brackets{kept}."""


class Filled(NamedTuple):
    """Possible edit: the pool after it, and the instruction in natural language."""

    pool: Pool
    instruction: str


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    edit: dict[str, Any]
    instruction: str


def slots_of(pool: Pool, task: TaskType) -> tuple[str, ...]:
    """Return the slots that the model fills; for added text that is only the new text."""
    if task == "text_change" and not any(x.text for x in pool.objects):
        return ("new",)
    return tuple(slot for slot in EDITS[task].model_fields if slot != "kept")


def edit_prompt(pool: Pool, instructions: Sequence[str], task: TaskType) -> str:
    """Return the prompt for the next edit.

    Args:
        pool: objects before the edit.
        instructions: instructions of the edits so far.
        task: type of the edit.
    """
    slots = slots_of(pool, task)
    objects = (x.model_dump(exclude={"original", "edited"}) for x in pool.objects)
    forms = {frozenset(re.findall(r"\{(\w+)\}", form)): form for form in EDITS[task].patterns}
    kept = [f'"{name}"' for name in _kept(pool, task).get("kept", ())]
    return PROMPT.format(
        objects="\n".join(json.dumps(x, ensure_ascii=False) for x in objects),
        edits="\n".join(f"{n}. {x}" for n, x in enumerate(instructions, 1)) or "none",
        task=task,
        form=re.sub(r"[{}]", "", forms[frozenset(slots)]),
        rules=TEXT_ADDED if slots == ("new",) else RULES[task],
        names=", ".join(pool.names),
        slots=", ".join(f'"{slot}": ...' for slot in slots),
        mentioned=", ".join(slots),
        kept=f", saying that {', '.join(kept)} stay as they are" if kept else "",
    )


def edit_schema(pool: Pool, task: TaskType) -> dict[str, Any]:
    """Return the JSON schema of the answer, which allows only names of objects in the pool."""
    known = EDITS[task].model_json_schema()["properties"]
    slots = {slot: known[slot] for slot in slots_of(pool, task)}
    written = {x.name: x.text for x in pool.objects if x.text}
    if "target" in slots:
        slots["target"] = {"enum": list(written if task == "text_change" else pool.available)}
    if "old" in slots:
        slots["old"] = {"enum": list(dict.fromkeys(written.values()))}
    if "reference" in slots:
        nothing = [None] if task == "subject_add" else []
        slots["reference"] = {"enum": [*pool.available, *nothing]}
    return strict_object({"edit": strict_object(slots), "instruction": {"type": "string"}})


def read_edit(text: str, pool: Pool, task: TaskType) -> Filled:
    """Parse the answer to ``edit_prompt``, and apply its edit.

    Args:
        text: answer of the model.
        pool: objects before the edit.
        task: type of the edit.

    Raises:
        AnswerError: the answer has another form (``Fault.format``), or its edit is impossible in
            this pool or its instruction does not mention every slot (``Fault.senseless``).

    Example:
        >>> from mteditflow.planner import ListedObject
        >>> pool = Pool.of([ListedObject(name="red car", color="red")])
        >>> edit = '{"target": "red car", "color": "blue"}'
        >>> answer = f'{{"edit": {edit}, "instruction": "Paint the red car blue."}}'
        >>> read_edit(answer, pool, "color_alter").pool.available
        ('blue car',)
    """
    answer = read_json(text, _Answer)
    slots = slots_of(pool, task)
    if set(answer.edit) != set(slots):
        message = f"{task}: expected the slots {list(slots)}, got {list(answer.edit)}"
        raise AnswerError(Fault.format, message)
    try:
        edit = EDITS[task].model_validate(answer.edit | _kept(pool, task))
        return Filled(pool.apply(edit), checked_phrase(answer.instruction, edit))
    except ValidationError as error:  # a ValueError, too, so it must come first
        raise AnswerError(Fault.format, f"{task}: {first_error(error)}") from error
    except ValueError as error:
        raise AnswerError(Fault.senseless, f"{task}: {error}") from error


def checked_phrase(instruction: str, edit: Edit) -> str:
    r"""Return an instruction as one line without outer quotes, if it mentions every slot.

    Names and values must appear word for word (a plural, possessive or adjective ending may
    follow), texts with their case, and a count in digits or as a word.

    Raises:
        ValueError: a slot is missing, or the line has square brackets.

    Example:
        >>> from mteditflow.planner import CountChange
        >>> checked_phrase('"Make it three\n cups."', CountChange(target="cup", count=3))
        'Make it three cups.'
    """
    line = unquoted(instruction)
    if "[" in line or "]" in line:
        raise ValueError(f"instruction: expected no square brackets, got {line!r}")
    for slot, value in edit:
        # Written text is case-sensitive, names and values are not.
        flags = 0 if isinstance(edit, TextChange) and slot != "target" else re.IGNORECASE
        for ways in _ways_to_say(value):
            if not any(re.search(_spoken(way), line, flags) for way in ways):
                raise ValueError(f"instruction: expected it to mention {ways[0]!r}, got {line!r}")
    return line


def _ways_to_say(value: str | int | tuple[str, ...] | None) -> list[tuple[str, ...]]:
    """Return the values that an instruction must mention, each with its spellings."""
    if isinstance(value, int):
        return [(str(value), NUMBERS[value - 1])]
    if isinstance(value, tuple):
        return [(name,) for name in value]
    return [] if value is None else [(value,)]


def _spoken(words: str) -> str:
    return rf"(?<!\w){re.escape(words)}(?:e?s|en|['\u2019]s)?(?!\w)"


def _kept(pool: Pool, task: TaskType) -> dict[str, tuple[str, ...]]:
    """Return the slot that the model does not fill, since the rules determine it."""
    return {"kept": pool.lasting} if task == "background_change" else {}
