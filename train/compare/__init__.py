"""`python -m train.compare`: see __main__.py."""
