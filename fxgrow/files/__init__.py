"""Models and weights on disk."""
