"""`python -m train.gpu`: whether all of it is right and fast on this machine's GPU."""
