"""`python -m train.benchmark`: what a training step costs, and where the time goes."""
