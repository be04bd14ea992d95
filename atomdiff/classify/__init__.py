"""Image classifiers tuned on folders of pictures, by the same methods as diffusion models."""
