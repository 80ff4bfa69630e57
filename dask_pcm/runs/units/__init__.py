"""What a unit of a run does on a worker."""
