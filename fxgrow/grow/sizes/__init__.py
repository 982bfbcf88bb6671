"""New shapes: the widths asked for, and the sizes of all that follow from them."""
