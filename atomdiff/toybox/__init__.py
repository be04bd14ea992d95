"""The embedded world: a renderer, a tiny Stable Diffusion trained on its pictures, and a judge that scores them."""
