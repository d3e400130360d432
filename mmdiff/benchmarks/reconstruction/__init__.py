"""Masked reconstruction: every method fills the same holes of the same images."""
