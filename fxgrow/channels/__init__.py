"""What belongs together: channels, the groups that change width as one, and residual blocks."""
