"""What ranks have to exchange: facts once, and sums in every logical step. It knows nothing of privacy."""

from ghostgrad.distributed.data_parallel import facts_of, inner_module, unsynchronised
from ghostgrad.distributed.fully_sharded import Shards, Unit, fully_sharded_modules
from ghostgrad.distributed.slices import is_split, like, local, runs
from ghostgrad.distributed.tensor_parallel import TensorParallel, on_this_rank
from ghostgrad.distributed.topology import Alone, Ranks, Topology, current

__all__ = [
    "Alone", "Ranks", "Shards", "TensorParallel", "Topology", "Unit", "current", "facts_of", "fully_sharded_modules",
    "inner_module", "is_split", "like", "local", "on_this_rank", "runs", "unsynchronised",
]  # fmt: skip
