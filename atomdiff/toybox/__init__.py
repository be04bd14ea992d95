"""The embedded world: a renderer, a tiny Stable Diffusion trained on its images, and a judge that scores them."""
