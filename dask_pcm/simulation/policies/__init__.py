"""The simulated policies: ours, and the baselines from the papers."""
