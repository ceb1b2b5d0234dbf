"""How a UNet is run."""
