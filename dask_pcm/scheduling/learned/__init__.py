"""What the policy has learned: costs, lifetimes, fairness, failures."""
