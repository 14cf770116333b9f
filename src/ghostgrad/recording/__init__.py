"""Probes and hooks, the proofs that rows are records, and nothing else."""

from ghostgrad.recording.recorder import Observation, Recorder, Sink
from ghostgrad.recording.refusals import check_batch_norms
from ghostgrad.recording.tape import Delivery, Tape
from ghostgrad.recording.weighing import Weight

__all__ = ["Delivery", "Observation", "Recorder", "Sink", "Tape", "Weight", "check_batch_norms"]
