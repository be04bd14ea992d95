"""Many subjects on many workers: the table, the queue, workers of this machine or of a Ray cluster, the report."""
