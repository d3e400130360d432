"""Data: rows of any source become batches {modality name: tensor} with per-sample `present` masks."""

from mmdiff.data.order import Order
from mmdiff.data.shapes import readers as shapes_rules
from mmdiff.data.sources import open_splits
from mmdiff.data.table import Batch, Holes, Rows, StandIn, Table

#: {embedded source: {column: images -> values}}: what can be read off a procedural image by the rule that made it.
RULES = {"shapes": shapes_rules.RULES}

__all__ = ["Batch", "Holes", "Order", "RULES", "Rows", "StandIn", "Table", "open_splits"]
