"""Pictures of hyperplanes, their spectra, and what surrounds an image."""
