"""Export of a trained prompt and LoRA: `python -m train.export`."""
