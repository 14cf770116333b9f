"""What ranks have to exchange: facts once, and sums in every logical step. It knows nothing of privacy."""

from ghostgrad.distributed.data_parallel import facts_of, inner_module, unsynchronised
from ghostgrad.distributed.topology import Alone, Ranks, Topology, current

__all__ = ["Alone", "Ranks", "Topology", "current", "facts_of", "inner_module", "unsynchronised"]
