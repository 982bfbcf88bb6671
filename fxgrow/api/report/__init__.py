"""What is told to the user: the report as data, and as tables."""
