"""Feature networks for sample quality metrics.

    name             input                                    features   classes
    inception        any image, resized to 299 pixels         2048       1008     for FID, IS and KID
    dinov2           any image, resized to 224 pixels         1024                ViT-L/14, as in Stein et al. 2023
    fashion_mnist    any image, grey, resized to 28 pixels    64         10       embedded
    digits           any image, grey, resized to 8 pixels     64         10       embedded
    clip_shapes      any image, resized to 32 pixels          64                  embedded; of images and captions
    clip_emoji       any image, resized to 32 pixels          64                  embedded; of images and captions
    identity         vectors                                  D

Inputs are bytes, (N, C, H, W) uint8, as in an image file; resizing and scaling are part of the network. Only a Frechet distance
on ``inception`` features is called FID; others are ``fd_<name>``.

Inception has the weights of torch-fidelity, converted from TensorFlow, and the resizing of TensorFlow 1, without antialiasing,
as in the literature. A download must match its SHA-256; the hash of a file given by the user is recorded in the protocol.

References:
    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, https://arxiv.org/abs/1512.00567.
    Obukhov et al., torch-fidelity, https://github.com/toshas/torch-fidelity.
    Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023, https://arxiv.org/abs/2304.07193.
    Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion models", 2023,
    https://arxiv.org/abs/2306.04675 (section 3).
    Parmar, Zhang, Zhu, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", 2022,
    https://arxiv.org/abs/2104.11222.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Tokens
from genzoo.console import log_stderr
from genzoo.environment import home
from genzoo.nn.contrastive import DualEncoder
from genzoo.nn.embeddings import embedding
from genzoo.nn.resnet import ConvEncoder
from genzoo.numerics.precision import full_float32
from genzoo.runs import ResourceError, write_atomically
from genzoo.text import Tokenizer

EMBEDDED = Path(__file__).parent / "networks"
CONTRASTIVE = "clip_"  # prefix of the names of embedded contrastive networks
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TIMEOUT = 10  # seconds, of the server
WEIGHT_BYTES = 2**32  # maximum size of a weights file


class FeatureError(ValueError):
    """A feature network is unavailable; the message is one line with a remedy."""

    exit_code = 2  # of the command line


class Features(NamedTuple):
    """Features and logits of a batch."""

    features: Tensor  # (N, D) float32
    logits: Tensor | None  # (N, K), of classifiers


class FeatureNetwork(ABC):
    """A pretrained feature network.

    Attributes:
        name: in the configuration.
        sha256: of its weights.
        dim: D.
        resize: description of the preprocessing.
        classes: data set whose classes its logits predict, if any.
        network: the module, if any.
        cpu_batch: maximum batch size on a CPU.
    """

    name: str
    sha256: str | None
    dim: int
    resize: str | None
    classes: str | None = None
    network: Any = None
    cpu_batch: int = 2**20

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Compute features of images, (N, C, H, W) uint8, or vectors, (N, D)."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Compute features in float32, without autocast and TF32."""
        device = images.device if self.network is None else self.device
        with torch.autocast(device.type, enabled=False), full_float32():
            return self.forward(images.to(device))

    def to(self, device: torch.device) -> FeatureNetwork:
        """Move the network."""
        if self.network is not None:
            self.network.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU for a network without weights."""
        return torch.device("cpu") if self.network is None else next(self.network.parameters()).device

    def effective_batch_size(self, batch_size: int) -> int:
        """Batch size, on a CPU at most ``cpu_batch``, whose activations fit in its cache."""
        return min(batch_size, self.cpu_batch) if self.device.type == "cpu" else batch_size

    @property
    def metadata(self) -> dict[str, Any]:
        """Entries of an evaluation protocol: name, hash, dimension and preprocessing."""
        return {"features": self.name, "features_sha256": self.sha256, "dim": self.dim, "resize": self.resize}

    @property
    def is_inception(self) -> bool:
        """Whether metrics have their names of the literature: FID, IS, KID."""
        return self.name == "inception"

    def extract(self, images: Tensor, batch_size: int = 250) -> Features:
        """Compute features in batches, returned on the CPU."""
        parts = [self(part) for part in images.split(self.effective_batch_size(batch_size))]
        logits = [part.logits.cpu() for part in parts if part.logits is not None]
        return Features(torch.cat([part.features.cpu() for part in parts]), torch.cat(logits) if logits else None)


class Identity(FeatureNetwork):
    """The identity, for vectors.

    Args:
        dim: D.
    """

    name, sha256, resize = "identity", None, None

    def __init__(self, dim: int = 2):
        self.dim = dim

    def forward(self, images: Tensor) -> Features:
        return Features(images.float(), None)


class SmallConvNet(nn.Module):
    """A CNN classifier of small grey images, (N, 1, S, S) on [-1, 1], with two or three resolutions.

    Args:
        side: S.
        num_classes: of the logits.
        width: channels at the first resolution.
        dim: of the features.
    """

    def __init__(self, side: int, num_classes: int, width: int = 32, dim: int = 64):
        super().__init__()
        self.side = side
        widths = [width, 2 * width] + [2 * width] * (side > 8)
        layers: list[nn.Module] = []
        inputs = 1
        for i, outputs in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if i else []
            for channels in (inputs, outputs):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.features = nn.Linear(inputs, dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.body(x).mean((2, 3)))
        return features, self.head(F.silu(features))


def _packaged(name: str) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Read a packaged network: its record in ``networks.json``, its weights, and their SHA-256.

    Raises:
        FeatureError: for a file with another SHA-256.
    """
    from safetensors.torch import load

    record = json.loads((EMBEDDED / "networks.json").read_text())[name]
    content = _verified(EMBEDDED / f"{name}.safetensors", record["sha256"])
    return record, load(content), record["sha256"]


def _verified(file: Path, expected: str) -> bytes:
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise FeatureError(f"{file}: its SHA-256 is {found}, not {expected}: install genzoo again")
    return content


class Embedded(FeatureNetwork):
    """A small classifier packaged with genzoo, trained on the training split of its data set.

    Its hyperparameters, test accuracy and SHA-256 are in ``networks.json``.

    Args:
        name: of a file in ``genzoo/metrics/networks``.

    Raises:
        FeatureError: for a file with another SHA-256.
    """

    def __init__(self, name: str):
        config, weights, self.sha256 = _packaged(name)
        self.name = name
        self.network = SmallConvNet(config["side"], config["num_classes"], config["width"], config["dim"])
        self.network.load_state_dict(weights)
        self.network.eval().requires_grad_(False)
        self.dim, self.classes = config["dim"], name
        self.resize = f"grey, bilinear with antialiasing to {self.network.side}x{self.network.side}"

    def forward(self, images: Tensor) -> Features:
        x, side = images.float().mean(1, keepdim=True), self.network.side
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        return Features(*self.network(x / 127.5 - 1))


class EmbeddedContrastive(FeatureNetwork):
    """A small contrastive network of images and captions packaged with genzoo, trained on the training split of its data set.

    The features of an image are its embedding times the square root of their number, so that their mean square is 1. The
    hyperparameters, held-out retrieval accuracies and SHA-256 of weights and tokenizer are in ``networks.json``.

    Args:
        name: of a file in ``genzoo/metrics/networks``.

    Attributes:
        tokenizer: of captions.

    Raises:
        FeatureError: for a file with another SHA-256.
    """

    network: DualEncoder

    def __init__(self, name: str):
        config, weights, self.sha256 = _packaged(name)
        tokenizer = _verified(EMBEDDED / f"{name}.tokenizer.json", config["tokenizer_sha256"])
        self.name, self.dim, self.side = name, config["dim"], config["side"]
        self.tokenizer = Tokenizer.from_json(tokenizer.decode())
        image = ConvEncoder((3, self.side, self.side), (self.dim,), None, **config["image"])
        condition = Tokens(self.tokenizer.length, self.tokenizer.vocabulary)
        text = embedding(condition, config["text_width"], False, None)
        self.network = DualEncoder(image, text, config["text_width"], self.dim)
        self.network.load_state_dict({key: value.float() for key, value in weights.items()})
        self.network.eval().requires_grad_(False)
        self.resize = f"colour, bilinear with antialiasing to {self.side}x{self.side}"

    def forward(self, images: Tensor) -> Features:
        return Features(self.dim**0.5 * self._embed(images), None)

    def _embed(self, images: Tensor) -> Tensor:
        x = _colour(images).float()
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        return self.network.embed_image((x + 0.5) / 128 - 1, None)

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Embed captions, of which long ones are cut, -> (N, D) of norm 1, on the CPU."""
        tokens = self.tokenizer.encode(captions, truncate=True).split(500)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), full_float32():
            return torch.cat([self.network.embed_text(part.to(self.device)).cpu() for part in tokens])


class Inception(FeatureNetwork):
    """Inception-v3 of the TensorFlow implementation of FID, by torch-fidelity.

    Args:
        weights: a file in the format of torch-fidelity; by default the published one, downloaded once.

    Raises:
        FeatureError: for a missing or wrong file.
    """

    name, dim, cpu_batch = "inception", 2048, 50
    resize = "bilinear of TensorFlow 1, without antialiasing, to 299x299"

    def __init__(self, weights: str | os.PathLike[str] | None = None):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        content = _read(Path(weights), "metrics.inception_weights") if weights else _published_inception()
        self.sha256 = hashlib.sha256(content).hexdigest()
        # torch-fidelity unpickles arbitrary objects: pass a copy with tensors only.
        copy = io.BytesIO()
        torch.save(_tensors(content, weights or "the downloaded file"), copy)
        copy.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy)
        except RuntimeError as error:
            raise FeatureError(
                f"metrics.inception_weights={weights}: not Inception-v3: {_first_line(error)}"
            ) from error

    def forward(self, images: Tensor) -> Features:
        return Features(*self.network(_colour(images)))


class DINOv2(FeatureNetwork):
    """DINOv2 ViT-L/14 by timm, the class token of the last layer.

    Args:
        weights: a checkpoint of timm's ``vit_large_patch14_dinov2``, .safetensors or .pth.

    Raises:
        FeatureError: without timm, or for a missing or wrong file.
    """

    name, dim = "dinov2", 1024
    resize = "bicubic with antialiasing to 224x224"
    ARCHITECTURE = "vit_large_patch14_dinov2"
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

    def __init__(self, weights: str | os.PathLike[str] | None):
        if weights is None:
            raise FeatureError(
                f"metrics.features=dinov2 needs metrics.dinov2_weights=FILE, a checkpoint of timm's {self.ARCHITECTURE}: "
                f"get model.safetensors from https://huggingface.co/timm/{self.ARCHITECTURE}.lvd142m"
            )
        try:
            import timm
        except ImportError as error:
            raise FeatureError("metrics.features=dinov2 needs timm: pip install 'genzoo[dinov2]'") from error
        content = _read(Path(weights), "metrics.dinov2_weights")
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.network = timm.create_model(self.ARCHITECTURE, num_classes=0, img_size=224, dynamic_img_size=True)
        self.network.eval().requires_grad_(False)
        state = _tensors(content, weights)
        grid = state.get("pos_embed")
        if grid is not None and grid.shape != self.network.pos_embed.shape:
            from timm.layers import resample_abs_pos_embed

            new_size = list(self.network.patch_embed.grid_size)
            state["pos_embed"] = resample_abs_pos_embed(grid, new_size)
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise FeatureError(
                f"metrics.dinov2_weights={weights}: not {self.ARCHITECTURE}: {_first_line(error)}"
            ) from error

    def forward(self, images: Tensor) -> Features:
        x = _colour(images).float() / 255
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (self.MEAN, self.STD))
        return Features(self.network((x - mean) / std), None)


def embedded() -> list[str]:
    """Names of the packaged networks."""
    return sorted(path.stem for path in EMBEDDED.glob("*.safetensors"))


def default_feature_network(data: str, shape: tuple[int, ...], levels: int | None) -> str:
    """Default feature network of a data set: an embedded one trained on it or on images of its shape, else Inception."""
    if levels is None:
        return "identity"
    for name in (data, f"clip_{data}"):
        if name in embedded():
            return name
    return "fashion_mnist" if shape == (1, 28, 28) else "inception"


@functools.lru_cache(maxsize=2)
def feature_network(
    name: str, inception_weights: str | None = None, dinov2_weights: str | None = None, dim: int = 2
) -> FeatureNetwork:
    """Build a feature network by name; ``dim`` is the dimension of vectors, for ``identity``.

    Raises:
        FeatureError: if it is unavailable.
    """
    if name == "identity":
        return Identity(dim)
    if name == "inception":
        return Inception(inception_weights)
    if name == "dinov2":
        return DINOv2(dinov2_weights)
    if name in embedded():
        return (EmbeddedContrastive if name.startswith(CONTRASTIVE) else Embedded)(name)
    known = ", ".join(["inception", "dinov2", *embedded(), "identity"])
    raise FeatureError(f"metrics.features={name}: choose from {known}")


def cache_folder() -> Path:
    """Folder of downloaded weights and reference features: $GENZOO_CACHE, else the user's cache folder.

    Without a home directory it is a private temporary folder.
    """
    if own := os.environ.get("GENZOO_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # relative paths are ignored, by the XDG base directory specification
        return Path(base, "genzoo")
    found = home()
    return (_temporary_home() if found is None else found / ".cache") / "genzoo"


@functools.cache
def _temporary_home() -> Path:
    return Path(tempfile.mkdtemp(prefix="genzoo-cache-"))


def check_cache() -> None:
    """Warn early about a cache that is not writable; its contents are then recomputed each time."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        key = "GENZOO_CACHE" if os.environ.get("GENZOO_CACHE") else "the cache"
        log_stderr(f"{key}={folder}: cannot be written to: {error.strerror}: results are not cached")


def _colour(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read(path: Path, key: str) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise FeatureError(f"{key}={path}: not a regular file")
        if path.stat().st_size > WEIGHT_BYTES:
            raise FeatureError(f"{key}={path}: larger than {WEIGHT_BYTES:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise FeatureError(f"{key}={path}: {error.strerror}") from error


def _tensors(content: bytes, name: Any) -> dict[str, Tensor]:
    """Load tensors only, from a .safetensors or a .pth."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError:
        pass
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive may raise any
        raise FeatureError(f"{name}: neither a safetensors nor a torch file: {_first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FeatureError(f"{name}: not a state dict")
    return state


def _published_inception() -> bytes:
    """Return torch-fidelity's weights from the cache or by download, verified by their SHA-256."""
    file = INCEPTION_URL.rpartition("/")[2]
    kept = cache_folder() / file
    for path in (kept, Path(torch.hub.get_dir()) / "checkpoints" / file):
        if os.path.isfile(path):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == INCEPTION_SHA256:
                return content
    try:
        with urlopen(Request(INCEPTION_URL, headers={"User-Agent": "genzoo"}), timeout=TIMEOUT) as response:
            content = response.read(2**28)  # larger than the file
    except OSError as error:
        raise FeatureError(
            f"metrics.features=inception: {file} is not in {kept.parent} and was not downloaded ({_first_line(error)}): "
            f"get it from {INCEPTION_URL} and set metrics.inception_weights=FILE, or use an embedded network, "
            f"metrics.features={embedded()[-1]}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != INCEPTION_SHA256:
        raise FeatureError(f"{INCEPTION_URL}: its SHA-256 is {found}, not {INCEPTION_SHA256}: download discarded")
    with contextlib.suppress(OSError, ResourceError):  # a read-only or full cache
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, content)
    return content
