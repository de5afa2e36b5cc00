"""Every sentence of the dissertation that can be measured, with a control and one rule."""
