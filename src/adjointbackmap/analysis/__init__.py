"""What hyperplanes say of an image: kinks and class boundaries around it, effective receptive fields."""
