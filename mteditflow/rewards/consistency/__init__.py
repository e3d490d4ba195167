"""Content consistency: similarity of the parts of an image that no instruction touched."""
