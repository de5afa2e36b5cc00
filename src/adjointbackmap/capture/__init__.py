"""The user's module: its graph from ``torch.export``, the constants it reads, copies of it."""
