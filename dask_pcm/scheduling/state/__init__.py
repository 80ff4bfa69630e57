"""What the policy knows: workers, contexts, runs and work that waits."""
