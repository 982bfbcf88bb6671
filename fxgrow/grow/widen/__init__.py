"""Plan wider channel groups."""
