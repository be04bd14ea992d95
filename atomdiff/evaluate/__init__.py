"""What a concept is worth: one metric a file, each a pure function."""
