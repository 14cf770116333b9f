"""Private training inside other people's trainers. Each module needs its own package, and nothing here is imported unasked.

* `PrivacyPlan`: how much privacy, for any of them
* `ghostgrad.integrations.transformers`: `DPTrainer`, a ``transformers.Trainer``
* `ghostgrad.integrations.lightning`: `DPCallback`, for an unmodified ``LightningModule``
* `ghostgrad.integrations.accelerate`: `prepare`, in place of ``Accelerator.prepare``
"""

from ghostgrad.integrations.plan import PrivacyPlan

__all__ = ["PrivacyPlan"]
