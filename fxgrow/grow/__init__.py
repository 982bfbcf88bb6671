"""The planners: how a network grows, decided on names and shapes. Each folder plans one thing."""
