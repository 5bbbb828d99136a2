"""What is on disk: the packed checkpoint."""
