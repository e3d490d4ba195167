"""Instruction following, asked of a vision-language model: prompts, answers, scores."""
