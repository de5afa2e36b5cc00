"""The public names of the package, in the order of the flow: this list is the only one."""
# ruff: noqa: I001 - imports stand in the order of the flow, not of the alphabet

# a picture becomes an image
from adjointbackmap.images import image as image, PreparedImage as PreparedImage

# a module becomes a network
from adjointbackmap.tracing import trace as trace
from adjointbackmap.engine.biases import Biases as Biases
from adjointbackmap.engine.layers import Layer as Layer
from adjointbackmap.engine.network import Network as Network
from adjointbackmap.engine.program import UnsupportedOperation as UnsupportedOperation
from adjointbackmap.engine.folding import fold as fold, Fold as Fold

# a network and an image become a linear map
from adjointbackmap.engine.pattern import record_pattern as record_pattern
from adjointbackmap.engine.pattern import ActivationPattern as ActivationPattern
from adjointbackmap.engine.operators import operator as operator, LayerOperator as LayerOperator

# the map becomes hyperplanes
from adjointbackmap.planes.planner import plan as plan
from adjointbackmap.planes.hyperplane import hyperplanes as hyperplanes
from adjointbackmap.planes.hyperplane import Hyperplanes as Hyperplanes
from adjointbackmap.planes.hyperplane import Contributions as Contributions
from adjointbackmap.planes.single import SingleHyperplane as SingleHyperplane
from adjointbackmap.planes.receipts import Receipt as Receipt

# more of them than memory holds, and on disk
from adjointbackmap.planes.streaming import iter_hyperplanes as iter_hyperplanes
from adjointbackmap.planes.storage import save as save, open as open
from adjointbackmap.planes.stored_planes import StoredPlanes as StoredPlanes

# a model and a picture: all of the above in one call
from adjointbackmap.explanations import explain as explain, Explanation as Explanation

# hyperplanes of the units that one points at, in a notebook
from adjointbackmap.explorer.notebook import explore as explore

# exactness
from adjointbackmap.engine.auditing import audit as audit
from adjointbackmap.exactness.checks import dot_test as dot_test, dense_test as dense_test
from adjointbackmap.exactness.checks import reconstruction_test as reconstruction_test
from adjointbackmap.exactness.verification import verify as verify
from adjointbackmap.exactness.layer_check import LayerCheck as LayerCheck

# what hyperplanes say of an image and of a network
from adjointbackmap.analysis.angles import angle_to_derivative as angle_to_derivative
from adjointbackmap.analysis.boundaries import analyse as analyse, Analysis as Analysis
from adjointbackmap.analysis.boundaries import boundary as boundary, Boundary as Boundary
from adjointbackmap.analysis.kinks import kink_distances as kink_distances
from adjointbackmap.analysis.kinks import KinkDistances as KinkDistances
from adjointbackmap.analysis.lines import region_line as region_line, RegionLine as RegionLine
from adjointbackmap.analysis.integrals import integrated_gradients as integrated_gradients
from adjointbackmap.analysis.integrals import IntegratedGradients as IntegratedGradients
from adjointbackmap.analysis.maps import region_map as region_map, RegionMap as RegionMap
from adjointbackmap.analysis.region_checks import line_test as line_test, map_test as map_test
from adjointbackmap.analysis.region_checks import integral_test as integral_test
from adjointbackmap.analysis.walks import region_walk as region_walk, RegionWalk as RegionWalk
from adjointbackmap.analysis.fields import effective_fields as effective_fields
from adjointbackmap.analysis.fields import EffectiveFields as EffectiveFields
from adjointbackmap.analysis.fields import sparsity as sparsity, Sparsity as Sparsity

# adversarial examples, pictures, spectra
from adjointbackmap import attacks as attacks, examples as examples
from adjointbackmap import plots as plots, spectra as spectra

# dialects of other libraries
from adjointbackmap import captum as captum, onnx as onnx, quantus as quantus

# networks and data of the study
from adjointbackmap import models as models, data as data

__version__: str
