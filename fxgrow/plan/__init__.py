"""Planning: from channel groups and a request to a plan, on names and shapes alone."""
