"""Concept files and what belongs to them: compatibility with a base, libraries, the Hub, model cards."""
