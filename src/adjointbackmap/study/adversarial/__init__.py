"""The adversarial experiments 1 to 3."""
