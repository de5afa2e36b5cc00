"""Pictures of hyperplanes, their spectra, and an image's surroundings."""
