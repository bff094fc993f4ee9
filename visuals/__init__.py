"""README's figures and numbers, from this repository's own code and a model that it trained."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = "configs/gpt2_124m.toml"  # which figures show
KEPT = ROOT / "visuals" / "model"  # `make demo`'s, rounded by visuals/keep.py
