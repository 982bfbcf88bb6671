"""Old channels to new ones: which channel of the grown network continues which of the old."""
