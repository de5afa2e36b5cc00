"""The experiments of the dissertation."""
