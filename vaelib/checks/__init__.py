"""Judges of a student's own code: each runs it beside the library's and says in words whether it is right, or what is wrong.

A check holds a table of known mistakes, see `vaelib.checks.verdicts`. A mistake is recognized where the student's results are those
of the mistake on every input, and the inputs are such that no two mistakes look alike. What the student's code raises is told in
the verdict; a check itself raises nothing but for wrong arguments of its own.
"""

from vaelib.checks.coders import POP_MISTAKES, PUSH_MISTAKES, check_coder
from vaelib.checks.codes import VQ_MISTAKES, check_vq
from vaelib.checks.denoising import DIFFUSION_MISTAKES, check_diffusion_loss
from vaelib.checks.densities import check_posterior, check_prior
from vaelib.checks.density import BERNOULLI_MISTAKES, LOGISTIC_MISTAKES, check_likelihood
from vaelib.checks.estimates import (
    ESS_MISTAKES,
    LOG_LIKELIHOOD_MISTAKES,
    LOG_WEIGHTS_MISTAKES,
    POOLED_MISTAKES,
    STANDARD_ERROR_MISTAKES,
    check_effective_sample_size,
    check_importance_weights,
    check_log_likelihood,
    check_pooled,
    check_standard_error,
)
from vaelib.checks.layers import (
    ANCESTRAL_MISTAKES,
    KL_BETWEEN_MISTAKES,
    LAYERED_ELBO_MISTAKES,
    LAYERED_EVIDENCE_MISTAKES,
    check_ancestral,
    check_kl_between,
    check_layered_elbo,
    check_layered_evidence,
)
from vaelib.checks.levels import (
    BITS_MISTAKES,
    LEVEL_DRAW_MISTAKES,
    LEVEL_MEAN_MISTAKES,
    SCALE_MISTAKES,
    check_bits_per_dim,
    check_level_draw,
    check_level_mean,
    check_optimal_scale,
)
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
    "ANCESTRAL_MISTAKES",
    "BERNOULLI_MISTAKES",
    "BITS_MISTAKES",
    "DIFFUSION_MISTAKES",
    "ELBO_MISTAKES",
    "ESS_MISTAKES",
    "IWAE_MISTAKES",
    "KL_BETWEEN_MISTAKES",
    "KL_MISTAKES",
    "LAYERED_ELBO_MISTAKES",
    "LAYERED_EVIDENCE_MISTAKES",
    "LEVEL_DRAW_MISTAKES",
    "LEVEL_MEAN_MISTAKES",
    "LOGISTIC_MISTAKES",
    "LOG_LIKELIHOOD_MISTAKES",
    "LOG_WEIGHTS_MISTAKES",
    "POOLED_MISTAKES",
    "POP_MISTAKES",
    "PUSH_MISTAKES",
    "REPARAMETERIZE_MISTAKES",
    "RETRIEVAL_MISTAKES",
    "SCALE_MISTAKES",
    "STANDARD_ERROR_MISTAKES",
    "TRAINING_MISTAKES",
    "VQ_MISTAKES",
    "Verdict",
    "check_ancestral",
    "check_bits_per_dim",
    "check_coder",
    "check_diffusion_loss",
    "check_effective_sample_size",
    "check_elbo",
    "check_encoder_decoder",
    "check_importance_weights",
    "check_iwae",
    "check_kl",
    "check_kl_between",
    "check_layered_elbo",
    "check_layered_evidence",
    "check_level_draw",
    "check_level_mean",
    "check_likelihood",
    "check_log_likelihood",
    "check_optimal_scale",
    "check_pooled",
    "check_posterior",
    "check_prior",
    "check_reparameterize",
    "check_retrieval",
    "check_standard_error",
    "check_training_step",
    "check_vq",
]  # fmt: skip
