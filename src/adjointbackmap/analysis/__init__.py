"""Analyses of hyperplanes: kinks and class boundaries near an image, effective fields."""
