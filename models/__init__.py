"""VAR and LlamaGen, reached by name: ``load_model("var-mini")``."""

from models.base import ARImageModel, SamplingOptions
from models.zoo import ZOO, load_model

__all__ = ["ZOO", "ARImageModel", "SamplingOptions", "load_model"]
