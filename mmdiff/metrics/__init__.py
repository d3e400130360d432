"""Numbers from tensors: classification, segmentation, image distances, bootstrap intervals."""
