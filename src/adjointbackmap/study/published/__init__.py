"""What the dissertation published."""
