"""How exact hyperplanes are: tests of the adjoint, and checks of all units over many images."""
