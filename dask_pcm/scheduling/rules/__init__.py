"""The rules of the policy, one per file."""
