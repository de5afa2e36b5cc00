"""Files that are written whole, checked when they are read, and held by one process at a time."""
