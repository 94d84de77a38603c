"""`python -m train.doctor`: what is wrong with a data set, before training finds out."""
