"""The ledger as a file: append-only, synced before the parameters change, each line bound to the one before. No torch.

``python -m ghostgrad.ledger run.jsonl`` verifies a file and prints epsilon.
"""

from ghostgrad.ledger.reading import Entry, LedgerText, read_ledger
from ghostgrad.ledger.writing import LedgerFile

__all__ = ["Entry", "LedgerFile", "LedgerText", "read_ledger"]
