"""VAR and LlamaGen, reached by name: ``load_model("var-mini")``."""

from models.base import ARImageModel, ARTransformer
from models.decoding import SamplingOptions
from models.devices import DTYPES, autocast
from models.errors import UserError
from models.loading import find_files, load_model, model_names, zoo_entry
from models.zoo import ZOO, Recipe

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
