"""Mona: small convolutional adapters of several scales after the residuals of blocks."""
