"""Content consistency: what no instruction touched must look the same."""
