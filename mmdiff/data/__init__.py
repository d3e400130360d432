"""Data: rows of a source become batches {modality: tensor} with a mask of present values for each modality."""

from mmdiff.data.order import Order
from mmdiff.data.shapes import readers as shapes_rules
from mmdiff.data.sources import open_splits
from mmdiff.data.table import Batch, Holes, Rows, StandIn, Table

#: {embedded source: {column: images -> values}}: what can be read exactly from a generated image.
RULES = {"shapes": shapes_rules.RULES}
#: {embedded source: {column: values -> bool}}: whether a value is whole, judged by itself.
WHOLE = {"shapes": {"mask": shapes_rules.whole_masks}}
#: {embedded source: {column: images -> raw values}}: the same of values that a modality must read first.
RAW_RULES = {"shapes": shapes_rules.RAW_RULES}

__all__ = ["RAW_RULES", "RULES", "WHOLE", "Batch", "Holes", "Order", "Rows", "StandIn", "Table", "open_splits"]
