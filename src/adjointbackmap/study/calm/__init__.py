"""Training that calms the hypersurface: how far hyperplanes turn, in networks trained for it."""
