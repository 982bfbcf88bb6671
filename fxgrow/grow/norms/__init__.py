"""What keeps the function: gains, normalisations over channels, and channels that hold zeros."""
