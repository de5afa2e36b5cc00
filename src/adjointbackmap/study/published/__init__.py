"""The published numbers of the dissertation."""
