"""Plan larger kernels."""
