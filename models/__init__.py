"""The models VAR and LlamaGen, loaded by name: ``load_model("var-mini")``."""

from models.base import ARImageModel, ARTransformer
from models.sampling import SamplingOptions
from models.utils.errors import UserError
from models.utils.precision import DTYPES, autocast
from models.zoo.loading import find_files, load_model, model_names, zoo_entry
from models.zoo.registry import ZOO, Recipe

__all__ = [
    "DTYPES",
    "ZOO",
    "ARImageModel",
    "ARTransformer",
    "Recipe",
    "SamplingOptions",
    "UserError",
    "autocast",
    "find_files",
    "load_model",
    "model_names",
    "zoo_entry",
]
