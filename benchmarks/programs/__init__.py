"""What runs as a process of its own in this project's environment."""
