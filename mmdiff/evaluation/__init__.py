"""Measuring what a model samples: plain metrics, evaluations per modality, the exact bound, speed."""
