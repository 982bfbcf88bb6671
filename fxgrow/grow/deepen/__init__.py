"""Plan new blocks."""
