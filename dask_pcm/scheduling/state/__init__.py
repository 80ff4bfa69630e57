"""The state that the policy decides on: workers, contexts, runs and waiting work."""
