"""The judge: what a surgery did is measured by code that shares nothing with the planners."""
