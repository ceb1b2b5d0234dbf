"""Comparison of methods, prompts and seeds by what was made: figures and one page of pictures."""
