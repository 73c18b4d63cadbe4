"""Training data: read, made into examples, packed into rows, drawn in batches.

`read` records -> `chat`, `drafts` texts and what of them is predicted -> `examples` tokens -> `packing` `rows` ->
`batches`. `labelled` is for classification. `tokens` is text as one stream of ids.
"""

from .batches import Batches, MixedBatches
from .examples import Examples, make_examples
from .labelled import Labelled, LabelledBatch
from .packing import PACKINGS, DataReport, make_rows, pack, split
from .read import read_documents
from .rows import IGNORE, PADDING, Batch, Rows
from .tokens import Data, to_tokens, tokenize

__all__ = [
    "IGNORE",
    "PACKINGS",
    "PADDING",
    "Batch",
    "Batches",
    "Data",
    "DataReport",
    "Examples",
    "Labelled",
    "LabelledBatch",
    "MixedBatches",
    "Rows",
    "make_examples",
    "make_rows",
    "pack",
    "read_documents",
    "split",
    "to_tokens",
    "tokenize",
]
