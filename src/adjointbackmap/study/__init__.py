"""The experiments of the dissertation, one file each."""
