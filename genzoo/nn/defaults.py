"""Default networks of the families, for images and for vectors.

Each is called as ``network(in_shape, out_shape, condition)``, as all networks of this package. They are those of
``conf/network`` with default hyperparameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from genzoo.conditions import Condition
from genzoo.nn.causal import CausalNetwork
from genzoo.nn.classifier import TimeConvNet
from genzoo.nn.dcgan import DCGANCritic, DCGANGenerator
from genzoo.nn.dit import DiT
from genzoo.nn.embeddings import embedding
from genzoo.nn.grid import GridDecoder, GridEncoder
from genzoo.nn.mlp import MLP, TimeMLP
from genzoo.nn.pixelcnn import PixelCNN
from genzoo.nn.r3gan import R3GANCritic, R3GANGenerator
from genzoo.nn.resnet import ConvDecoder, ConvEncoder, ConvNet
from genzoo.nn.transformer import Transformer
from genzoo.nn.unet import UNet

Shape = Sequence[int]


def _is_image(shape: Shape) -> bool:
    return len(shape) == 3


def encoder(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the encoder of an autoencoder with a vector latent."""
    return (ConvEncoder if _is_image(in_shape) else MLP)(in_shape, out_shape, condition)


def decoder(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the decoder of an autoencoder with a vector latent."""
    return (ConvDecoder if _is_image(out_shape) else MLP)(in_shape, out_shape, condition)


def grid_encoder(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the encoder of an autoencoder with a latent grid."""
    return (GridEncoder if _is_image(in_shape) else MLP)(in_shape, out_shape, condition)


def grid_decoder(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the decoder of an autoencoder with a latent grid."""
    return (GridDecoder if _is_image(out_shape) else MLP)(in_shape, out_shape, condition)


def grid_reducer(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the network from a grid of features to a coarser one; a single column holds those of a vector."""
    return (MLP if in_shape[2] == 1 else GridEncoder)(in_shape, out_shape, condition)


def grid_expander(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the network from a grid of features to a finer one; a single column holds those of a vector."""
    return (MLP if out_shape[2] == 1 else GridDecoder)(in_shape, out_shape, condition)


def denoiser(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the network of a diffusion or flow model."""
    if _is_image(in_shape):
        return UNet(in_shape, out_shape, condition, channels=32, multipliers=(1, 2))
    return TimeMLP(in_shape, out_shape, condition)


def text_encoder(condition: Condition, features: int) -> nn.Module:
    """Build the encoder of conditions of a contrastive network."""
    return embedding(condition, features, False, None)


def noisy_classifier(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the network of a classifier of noisy data."""
    return (TimeConvNet if _is_image(in_shape) else TimeMLP)(in_shape, out_shape, condition)


def generator(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the generator of a GAN."""
    return (DCGANGenerator if _is_image(out_shape) else MLP)(in_shape, out_shape, condition)


def critic(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the critic of a GAN."""
    return (DCGANCritic if _is_image(in_shape) else MLP)(in_shape, out_shape, condition)


def critic_without_norm(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build a critic without batch norm, for per-sample gradient penalties."""
    if _is_image(in_shape):
        return ConvEncoder(in_shape, out_shape, condition, width=64, blocks=0, norm=False, hidden=256)
    return MLP(in_shape, out_shape, condition)


def modern_generator(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the generator of R3GAN, without normalisation."""
    return (R3GANGenerator if _is_image(out_shape) else MLP)(in_shape, out_shape, condition)


def modern_critic(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the critic of R3GAN, without normalisation."""
    return (R3GANCritic if _is_image(in_shape) else MLP)(in_shape, out_shape, condition)


def causal(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> CausalNetwork:
    """Build the network of an autoregressive model; a vector is an image of one column."""
    return (Transformer if in_shape[2] == 1 else PixelCNN)(in_shape, out_shape, condition)


def masked(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the network of a discrete diffusion model, a transformer of all positions."""
    return DiT(in_shape, out_shape, condition, patch=1)


def coupling(in_shape: Shape, out_shape: Shape, condition: Condition | None = None) -> nn.Module:
    """Build the zero-initialised network of a coupling layer."""
    if _is_image(in_shape) and tuple(in_shape[1:]) != (1, 1):
        return ConvNet(in_shape, out_shape, condition)
    return MLP(in_shape, out_shape, condition, width=64, depth=1, zero_init=True)
