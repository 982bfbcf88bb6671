"""Plan from one architecture to a larger one."""
