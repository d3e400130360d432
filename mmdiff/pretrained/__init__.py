"""`backbone.initialize_from`: networks of diffusers, and backbones of other models of mmdiff, to start from."""

from mmdiff.pretrained.settings import check_agrees, contradictions, with_source
from mmdiff.pretrained.source import KEY, Found, find
from mmdiff.pretrained.weights import load_network

__all__ = ["KEY", "Found", "check_agrees", "contradictions", "find", "load_network", "with_source"]
