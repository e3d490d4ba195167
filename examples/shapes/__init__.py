"""The shapes world: tiny images, edits by rule, exact rewards, and a tiny FLUX editor for them."""
