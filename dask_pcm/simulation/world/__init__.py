"""The simulated world: time, links, workers, staging."""
