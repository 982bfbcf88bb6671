"""A user's module: built, copied, called and filled with inputs, and never changed."""
