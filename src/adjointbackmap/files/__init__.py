"""Files that are written whole, read back with care, and shared by one process at a time."""
