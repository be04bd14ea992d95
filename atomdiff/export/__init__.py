"""Concepts as forms that other programs read, and atoms extracted from tuned models."""
