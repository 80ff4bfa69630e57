"""What runs in a nanny process."""
