"""genzoo: families of generative models behind one interface, trained, evaluated and compared by the same protocols."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genzoo.api import compare as compare
    from genzoo.api import edit as edit
    from genzoo.api import evaluate as evaluate
    from genzoo.api import sample as sample
    from genzoo.api import train as train
    from genzoo.api import vary as vary
    from genzoo.conditions import ClassLabels as ClassLabels
    from genzoo.conditions import Image as Image
    from genzoo.conditions import Tokens as Tokens
    from genzoo.conditions import Vector as Vector
    from genzoo.event import EventSpec as EventSpec
    from genzoo.explore import add_direction as add_direction
    from genzoo.explore import attribute_direction as attribute_direction
    from genzoo.explore import compress as compress
    from genzoo.explore import decode as decode
    from genzoo.explore import decompress as decompress
    from genzoo.explore import encode as encode
    from genzoo.explore import interpolate as interpolate
    from genzoo.explore import reconstruct as reconstruct
    from genzoo.explore import trajectory as trajectory
    from genzoo.explore import traverse as traverse
    from genzoo.families.autoregressive import Autoregressive as Autoregressive
    from genzoo.families.clip import Contrastive as Contrastive
    from genzoo.families.consistency import Consistency as Consistency
    from genzoo.families.ddpm import DDPM as DDPM
    from genzoo.families.ebm import EBM as EBM
    from genzoo.families.ebm import JEM as JEM
    from genzoo.families.ebm import ebm as ebm
    from genzoo.families.flow_matching import FlowMatching as FlowMatching
    from genzoo.families.gan import GAN as GAN
    from genzoo.families.gan import WGAN as WGAN
    from genzoo.families.gan import WGANGP as WGANGP
    from genzoo.families.glow import Glow as Glow
    from genzoo.families.gmm import GMM as GMM
    from genzoo.families.hvae import HVAE as HVAE
    from genzoo.families.latent import LatentDensity as LatentDensity
    from genzoo.families.latent import LatentModel as LatentModel
    from genzoo.families.latent import latent as latent
    from genzoo.families.maf import MAF as MAF
    from genzoo.families.masked_diffusion import MaskedDiffusion as MaskedDiffusion
    from genzoo.families.mean_flow import MeanFlow as MeanFlow
    from genzoo.families.nsf import NSF as NSF
    from genzoo.families.r3gan import R3GAN as R3GAN
    from genzoo.families.rae import RAE as RAE
    from genzoo.families.realnvp import RealNVP as RealNVP
    from genzoo.families.score_sde import ScoreSDE as ScoreSDE
    from genzoo.families.unclip import UnCLIP as UnCLIP
    from genzoo.families.vae import VAE as VAE
    from genzoo.families.vae import FlowPosteriorVAE as FlowPosteriorVAE
    from genzoo.families.vae import LearnedPriorVAE as LearnedPriorVAE
    from genzoo.families.vae import VampPrior as VampPrior
    from genzoo.families.vae import vae as vae
    from genzoo.families.vqgan import VQGAN as VQGAN
    from genzoo.families.vqvae import VQVAE as VQVAE
    from genzoo.families.vqvae2 import VQVAE2 as VQVAE2
    from genzoo.families.vqvae2 import vqvae2 as vqvae2
    from genzoo.loading import load as load

__version__ = "0.1.0"

# Names are imported lazily, so that `python -m genzoo --help` does not import torch.
_HOME = {
    "train": "genzoo.api",
    "sample": "genzoo.api",
    "evaluate": "genzoo.api",
    "compare": "genzoo.api",
    "encode": "genzoo.explore",
    "decode": "genzoo.explore",
    "reconstruct": "genzoo.explore",
    "interpolate": "genzoo.explore",
    "traverse": "genzoo.explore",
    "attribute_direction": "genzoo.explore",
    "add_direction": "genzoo.explore",
    "trajectory": "genzoo.explore",
    "compress": "genzoo.explore",
    "decompress": "genzoo.explore",
    "edit": "genzoo.api",
    "vary": "genzoo.api",
    "EventSpec": "genzoo.event",
    "ClassLabels": "genzoo.conditions",
    "Image": "genzoo.conditions",
    "Tokens": "genzoo.conditions",
    "Vector": "genzoo.conditions",
    "load": "genzoo.loading",
    "Autoregressive": "genzoo.families.autoregressive",
    "Consistency": "genzoo.families.consistency",
    "Contrastive": "genzoo.families.clip",
    "DDPM": "genzoo.families.ddpm",
    "EBM": "genzoo.families.ebm",
    "FlowMatching": "genzoo.families.flow_matching",
    "Glow": "genzoo.families.glow",
    "FlowPosteriorVAE": "genzoo.families.vae",
    "GAN": "genzoo.families.gan",
    "GMM": "genzoo.families.gmm",
    "HVAE": "genzoo.families.hvae",
    "JEM": "genzoo.families.ebm",
    "LatentDensity": "genzoo.families.latent",
    "LatentModel": "genzoo.families.latent",
    "LearnedPriorVAE": "genzoo.families.vae",
    "MAF": "genzoo.families.maf",
    "NSF": "genzoo.families.nsf",
    "MaskedDiffusion": "genzoo.families.masked_diffusion",
    "RAE": "genzoo.families.rae",
    "R3GAN": "genzoo.families.r3gan",
    "MeanFlow": "genzoo.families.mean_flow",
    "RealNVP": "genzoo.families.realnvp",
    "ScoreSDE": "genzoo.families.score_sde",
    "UnCLIP": "genzoo.families.unclip",
    "VAE": "genzoo.families.vae",
    "VQGAN": "genzoo.families.vqgan",
    "VQVAE": "genzoo.families.vqvae",
    "VampPrior": "genzoo.families.vae",
    "VQVAE2": "genzoo.families.vqvae2",
    "WGAN": "genzoo.families.gan",
    "WGANGP": "genzoo.families.gan",
    "ebm": "genzoo.families.ebm",
    "latent": "genzoo.families.latent",
    "vae": "genzoo.families.vae",
    "vqvae2": "genzoo.families.vqvae2",
}
__all__ = [
    "train",
    "sample",
    "evaluate",
    "compare",
    "encode",
    "decode",
    "reconstruct",
    "interpolate",
    "traverse",
    "attribute_direction",
    "add_direction",
    "trajectory",
    "compress",
    "decompress",
    "edit",
    "vary",
    "EventSpec",
    "ClassLabels",
    "Vector",
    "Tokens",
    "Image",
    "Autoregressive",
    "Consistency",
    "Contrastive",
    "DDPM",
    "EBM",
    "FlowMatching",
    "FlowPosteriorVAE",
    "GAN",
    "GMM",
    "Glow",
    "HVAE",
    "JEM",
    "LatentDensity",
    "LatentModel",
    "LearnedPriorVAE",
    "MAF",
    "NSF",
    "MaskedDiffusion",
    "RAE",
    "R3GAN",
    "MeanFlow",
    "RealNVP",
    "ScoreSDE",
    "UnCLIP",
    "VAE",
    "VQGAN",
    "VQVAE",
    "VampPrior",
    "VQVAE2",
    "WGAN",
    "WGANGP",
    "ebm",
    "latent",
    "load",
    "vae",
    "vqvae2",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'genzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
