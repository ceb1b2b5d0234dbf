"""Any Stable Diffusion folder as a frozen noise predictor.

diffusers and transformers are imported when a model is loaded, never by importing this package.
"""

from dsd_fast.diffusion.loader import load_model
from dsd_fast.diffusion.model import DiffusionModel
from dsd_fast.diffusion.text import PromptEmbeddings, embed_views, view_prompts

__all__ = ["DiffusionModel", "PromptEmbeddings", "embed_views", "load_model", "view_prompts"]
