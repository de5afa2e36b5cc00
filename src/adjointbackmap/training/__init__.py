"""Training of the study's networks."""

from adjointbackmap.training.evaluation import accuracy
from adjointbackmap.training.loop import train
from adjointbackmap.training.recipes import Recipe, choose_recipe, study_recipe
from adjointbackmap.training.task import Progress, Setting, Task

__all__ = [
    "Progress",
    "Recipe",
    "Setting",
    "Task",
    "accuracy",
    "choose_recipe",
    "study_recipe",
    "train",
]
