"""Evaluation: a prompt suite, the encoders that look at its images, and one metric a file."""
