"""Live objects: taken apart, kept in host memory, and put together again."""
