"""Concepts in diffusers pipelines: load, switch, weigh, mix in a batch, take out again."""
