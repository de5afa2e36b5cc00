"""Training of the study's networks."""
