"""The commands: each module here is run as `python -m train.NAME`. What they share with a notebook is in `softprompt`."""
