"""The recipe for small reference models with EMO's objective. `python -m training.train --help` shows the options."""
