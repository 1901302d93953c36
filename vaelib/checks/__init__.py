"""Judges of a student's own code: each runs it beside the library's and says in words whether it is right, or what is wrong.

A check holds a table of known mistakes, see `vaelib.checks.verdicts`. A mistake is recognized where the student's results are those
of the mistake on every input, and the inputs are such that no two mistakes look alike. What the student's code raises is told in
the verdict; a check itself raises nothing but for wrong arguments of its own.
"""

from vaelib.checks.densities import check_posterior, check_prior
from vaelib.checks.density import BERNOULLI_MISTAKES, LOGISTIC_MISTAKES, check_likelihood
from vaelib.checks.networks import check_encoder_decoder
from vaelib.checks.search import RETRIEVAL_MISTAKES, check_retrieval
from vaelib.checks.steps import TRAINING_MISTAKES, check_training_step
from vaelib.checks.terms import (
    ELBO_MISTAKES,
    IWAE_MISTAKES,
    KL_MISTAKES,
    REPARAMETERIZE_MISTAKES,
    check_elbo,
    check_iwae,
    check_kl,
    check_reparameterize,
)
from vaelib.checks.verdicts import Verdict

__all__ = [
    "BERNOULLI_MISTAKES", "ELBO_MISTAKES", "IWAE_MISTAKES", "KL_MISTAKES", "LOGISTIC_MISTAKES", "REPARAMETERIZE_MISTAKES",
    "RETRIEVAL_MISTAKES", "TRAINING_MISTAKES", "Verdict", "check_elbo", "check_encoder_decoder", "check_iwae", "check_kl",
    "check_likelihood", "check_posterior", "check_prior", "check_reparameterize", "check_retrieval", "check_training_step",
]  # fmt: skip
