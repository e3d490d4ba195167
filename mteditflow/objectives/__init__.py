"""Objectives: one room each, pure functions of tensors, unreduced; none knows another."""
