"""Our forwards of the networks of diffusion models."""
