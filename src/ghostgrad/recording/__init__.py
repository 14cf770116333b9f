"""Probes and hooks, the proofs that rows are records, and nothing else."""

from ghostgrad.recording.recorder import Observation, Recorder
from ghostgrad.recording.refusals import check_batch_norms
from ghostgrad.recording.sink import Sink
from ghostgrad.recording.tape import Delivery, Tape
from ghostgrad.recording.weighing import Footprint, address_of

__all__ = ["Delivery", "Footprint", "Observation", "Recorder", "Sink", "Tape", "address_of", "check_batch_norms"]
