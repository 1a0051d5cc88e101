"""The embedded default: a tiny FLUX pipeline, its preference model and its prompts. Only paths here; see README.md."""

from pathlib import Path

ROOT = Path(__file__).parent
PIPELINE_DIR = ROOT / "pipeline"
PREFERENCE_CHECKPOINT = ROOT / "preference.pt"
PREFERENCE_ARCHITECTURE = ROOT / "preference.json"
TRAIN_PROMPTS = ROOT / "prompts_train.txt"
HELDOUT_PROMPTS = ROOT / "prompts_heldout.txt"
