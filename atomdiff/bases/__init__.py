"""Base architectures: what differs between Stable Diffusion 1.x and 2.x, SDXL and those to come."""
