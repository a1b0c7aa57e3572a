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
    from genzoo.families.ddpm import DDPM as DDPM
    from genzoo.families.flow_matching import FlowMatching as FlowMatching
    from genzoo.families.gan import GAN as GAN
    from genzoo.families.gan import WGAN as WGAN
    from genzoo.families.gan import WGANGP as WGANGP
    from genzoo.families.glow import Glow as Glow
    from genzoo.families.hvae import HVAE as HVAE
    from genzoo.families.latent import LatentDensity as LatentDensity
    from genzoo.families.latent import LatentModel as LatentModel
    from genzoo.families.latent import latent as latent
    from genzoo.families.maf import MAF as MAF
    from genzoo.families.masked_diffusion import MaskedDiffusion as MaskedDiffusion
    from genzoo.families.nsf import NSF as NSF
    from genzoo.families.realnvp import RealNVP as RealNVP
    from genzoo.families.score_sde import ScoreSDE as ScoreSDE
    from genzoo.families.unclip import UnCLIP as UnCLIP
    from genzoo.families.vae import VAE as VAE
    from genzoo.families.vqvae import VQVAE as VQVAE
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
    "Contrastive": "genzoo.families.clip",
    "DDPM": "genzoo.families.ddpm",
    "FlowMatching": "genzoo.families.flow_matching",
    "Glow": "genzoo.families.glow",
    "GAN": "genzoo.families.gan",
    "HVAE": "genzoo.families.hvae",
    "LatentDensity": "genzoo.families.latent",
    "LatentModel": "genzoo.families.latent",
    "MAF": "genzoo.families.maf",
    "NSF": "genzoo.families.nsf",
    "MaskedDiffusion": "genzoo.families.masked_diffusion",
    "RealNVP": "genzoo.families.realnvp",
    "ScoreSDE": "genzoo.families.score_sde",
    "UnCLIP": "genzoo.families.unclip",
    "VAE": "genzoo.families.vae",
    "VQVAE": "genzoo.families.vqvae",
    "WGAN": "genzoo.families.gan",
    "WGANGP": "genzoo.families.gan",
    "latent": "genzoo.families.latent",
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
    "Contrastive",
    "DDPM",
    "FlowMatching",
    "GAN",
    "Glow",
    "HVAE",
    "LatentDensity",
    "LatentModel",
    "MAF",
    "NSF",
    "MaskedDiffusion",
    "RealNVP",
    "ScoreSDE",
    "UnCLIP",
    "VAE",
    "VQVAE",
    "WGAN",
    "WGANGP",
    "latent",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'genzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
