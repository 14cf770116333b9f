"""The maths of one weight: each record's gradient of it, its squared norm, and the weighted sum over records."""

from ghostgrad.gradients.convolution import Convolution
from ghostgrad.gradients.explicit import Explicit
from ghostgrad.gradients.join import Joined, join
from ghostgrad.gradients.lookup import Lookup
from ghostgrad.gradients.matmul import Matmul
from ghostgrad.gradients.together import all_sq_norms, all_weighted_sums
from ghostgrad.gradients.use import Use, wide

__all__ = [
    "Convolution",
    "Explicit",
    "Joined",
    "Lookup",
    "Matmul",
    "Use",
    "all_sq_norms",
    "all_weighted_sums",
    "join",
    "wide",
]
