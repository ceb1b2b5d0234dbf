"""Any Stable Diffusion folder as a frozen noise predictor.

diffusers and transformers are imported when a model is loaded, never by importing this package.
"""

from dsd_fast.diffusion.loader import load_model, load_view_model
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.text import PromptEmbeddings, embed_views, view_prompts
from dsd_fast.diffusion.view_model import ViewModel

__all__ = [
    "DiffusionModel",
    "PromptEmbeddings",
    "ViewModel",
    "embed_views",
    "load_model",
    "load_view_model",
    "view_prompts",
]
