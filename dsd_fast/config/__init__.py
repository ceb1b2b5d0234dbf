"""The configuration of a run: the tree of settings, its presets, and its JSON form."""

from dsd_fast.config.tree import *  # noqa: F403
