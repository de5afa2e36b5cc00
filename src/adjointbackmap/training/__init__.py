"""Training of the study's networks."""

from adjointbackmap.training.loop import Progress, Setting, Task, accuracy, train
from adjointbackmap.training.recipes import Recipe, choose_recipe, study_recipe

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
