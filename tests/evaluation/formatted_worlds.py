"""Chains of the shapes world with formatted instructions."""

from mteditflow_examples.shapes.served import record_of

FORMS = {  # of what a detector can tell
    "subject_add": "Add [{name}]",
    "subject_remove": "Remove [{name}]",
    "subject_replace": "Replace [{name}] with [{color} {value}]",
    "count_change": "Change the count of [{name}] to [{count}]",
}
ASKED = {"color_alter": "Change the color of [{name}] to [{value}]"}  # of a judge


def world_chain(world):
    """A chain of the shapes world with the formatted instructions of some of its edit types."""
    told = [
        (FORMS | ASKED)
        .get(edit.task_type, edit.instruction)
        .format(
            name=f"{edit.color} {edit.shape}",
            color=edit.color,
            value=edit.value,
            count={"two": 2}.get(edit.value, 1),
        )
        for edit in world.edits
    ]
    return record_of(world).model_copy(update={"formatted_instructions": tuple(told)})
