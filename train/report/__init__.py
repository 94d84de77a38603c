"""The report of a run: `python -m train.report`."""
