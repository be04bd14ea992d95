"""What all subpackages use: errors, files, precision, options, progress."""
