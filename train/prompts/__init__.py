"""`python -m train.prompts`: inspect, check, make, mix and convert prompt files, without training."""
