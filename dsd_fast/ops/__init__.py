"""Operators over csrc: each has a pure-torch reference, a CPU kernel, a CUDA kernel, a
torch.library operator (namespace ``dsd_fast``, with fake and autograd) and a test."""
