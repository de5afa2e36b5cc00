"""How exact hyperplanes are: tests of the adjoint, every unit of every layer, many images."""
