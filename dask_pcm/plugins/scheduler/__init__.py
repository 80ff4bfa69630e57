"""What runs in the scheduler process."""
