"""Find what is wrong with a data set before training: `python -m train.doctor`."""
