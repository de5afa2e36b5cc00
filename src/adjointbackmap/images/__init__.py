"""Pictures of any kind become the input of a network."""

from adjointbackmap.images.preparing import PreparedImage, image
from adjointbackmap.images.preprocessing import PRESETS, Preparation, Preprocessing

__all__ = ["PRESETS", "Preparation", "PreparedImage", "Preprocessing", "image"]
