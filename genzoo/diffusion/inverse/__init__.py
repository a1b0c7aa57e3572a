"""Linear inverse problems with any denoiser: operators, observations, and samplers of the posterior."""

from genzoo.diffusion.inverse.dps import DPS
from genzoo.diffusion.inverse.moment_matching import MomentMatching
from genzoo.diffusion.inverse.operators import (
    Blur,
    Downsampling,
    Grey,
    Identity,
    Inpainting,
    LinearOperator,
    Observation,
)
from genzoo.diffusion.inverse.pigdm import PiGDM
from genzoo.diffusion.inverse.repaint import RePaint
from genzoo.diffusion.inverse.sampler import InverseSampler

__all__ = [
    "DPS",
    "Blur",
    "Downsampling",
    "Grey",
    "Identity",
    "Inpainting",
    "InverseSampler",
    "LinearOperator",
    "MomentMatching",
    "Observation",
    "PiGDM",
    "RePaint",
]
