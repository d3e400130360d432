"""A procedural data set with exact truth for every modality."""
