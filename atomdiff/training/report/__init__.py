"""The report of a training run: a verdict with its evidence, curves, images and figures, as a page to read."""
