"""Instruction following scored by a vision-language model: prompts, answers, scores."""
