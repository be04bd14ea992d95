"""Prompts x seeds x concepts become image files."""
