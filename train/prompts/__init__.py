"""`python -m train.prompts`: prompt files looked at, checked, made, mixed and converted, without training."""
