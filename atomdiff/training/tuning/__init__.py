"""A search of settings by the validation loss: search space, trials that share a base, study and results."""
