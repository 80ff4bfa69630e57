"""What is resident in a worker, and on which tier."""
