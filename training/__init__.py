"""Recipe for small reference models with EMO's objective. `python -m training.train --help` is the way in."""
