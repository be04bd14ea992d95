"""The training run: images of a subject in, a concept out."""
