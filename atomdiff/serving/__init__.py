"""Serves images to many callers at once: an engine that batches their denoising steps, and its HTTP server."""
