"""Image classifiers tuned on folders of images, by the same methods as diffusion models."""
