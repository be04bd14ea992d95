"""Tests, which mirror the package; what spans rooms is in `integration`."""
