"""Conv-Adapter: narrow convolutional branches beside or after convolutions, or residual blocks."""
