"""Losses: pure functions of tensors, unreduced, one file per objective; none imports another."""
