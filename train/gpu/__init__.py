"""`python -m train.gpu`: check correctness and speed on this machine's GPU."""
