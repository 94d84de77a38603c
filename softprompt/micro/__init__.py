"""The embedded default: a small pretrained pipeline in FaceLift's folder format, and the world it was trained on.

`world.py` draws objects, `pipeckpts` holds the weights, `python -m train.micro` makes them again from nothing.
"""

from pathlib import Path

MICRO_MODEL = Path(__file__).parent / "pipeckpts"
"""The packaged pipeline folder, for `softprompt.model.pipeline.load_pipeline`."""
