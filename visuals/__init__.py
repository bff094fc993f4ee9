"""README's figures and numbers, from this repository's own code and a model that it trained."""

from pathlib import Path

KEPT = Path(__file__).parent / "model"  # `make demo`'s, rounded by visuals/keep.py
