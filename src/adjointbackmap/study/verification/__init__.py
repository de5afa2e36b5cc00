"""Verification of every unit of every layer over the test images."""
