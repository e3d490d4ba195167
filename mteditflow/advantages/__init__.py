"""Advantages: groups and fusion, aggregation of turns, credit, selection, pairs, floors."""
