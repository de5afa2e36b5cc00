"""The user's module: its graph as torch.export sees it, the constants that it reads, copies and fingerprints of it."""
