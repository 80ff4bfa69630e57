"""What the policy decides, a rule a file."""
