"""Samplers of Gaussian paths, for any ``Denoiser``."""

from genzoo.diffusion.samplers.ancestral import Ancestral
from genzoo.diffusion.samplers.ddim import DDIM
from genzoo.diffusion.samplers.dpm_solver import DPMSolver
from genzoo.diffusion.samplers.euler_maruyama import EulerMaruyama
from genzoo.diffusion.samplers.jump import Jump
from genzoo.diffusion.samplers.ode import AdaptiveODE, Euler, Heun, Midpoint
from genzoo.diffusion.samplers.predictor_corrector import PredictorCorrector
from genzoo.diffusion.samplers.sampler import Sampler

__all__ = [
    "AdaptiveODE",
    "Ancestral",
    "DDIM",
    "DPMSolver",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Jump",
    "Midpoint",
    "PredictorCorrector",
    "Sampler",
]
