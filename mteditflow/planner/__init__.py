"""Planning chains of edits that make sense at every turn, from images alone.

Needs the extra ``mteditflow[rewards]``: the planner asks through the judge's client and looks
through the detector of content consistency.
"""
