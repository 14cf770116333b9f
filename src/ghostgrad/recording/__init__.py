"""Probes and hooks, the proofs that rows are records, and nothing else."""

from ghostgrad.recording.recorder import Observation, Recorder, Sink
from ghostgrad.recording.refusals import check_batch_norms
from ghostgrad.recording.tape import Delivery, Tape
from ghostgrad.recording.weighing import Footprint

__all__ = ["Delivery", "Footprint", "Observation", "Recorder", "Sink", "Tape", "check_batch_norms"]
