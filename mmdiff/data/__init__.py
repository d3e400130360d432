"""Data: rows of any source become batches {modality name: tensor} with per-sample `present` masks."""

from mmdiff.data.sampler import Order
from mmdiff.data.sources import Batch, Table, open_splits

__all__ = ["Batch", "Order", "Table", "open_splits"]
