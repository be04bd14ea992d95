"""What every room uses and none is about: errors, files, precision, options, progress."""
