"""Data sets: 2-D toy densities and images."""

from genzoo.data.dataset import DataError, DataSet, Split
from genzoo.data.densities import (
    Checkerboard,
    GaussianMixture,
    LabelledDensity,
    Moons,
    PlaneDensity,
    SwissRoll,
    plane_dataset,
)
from genzoo.data.images import cifar10, digits, fashion_mnist, folder, mnist
from genzoo.data.validation import with_validation

__all__ = [
    "Checkerboard",
    "DataError",
    "DataSet",
    "GaussianMixture",
    "LabelledDensity",
    "Moons",
    "PlaneDensity",
    "Split",
    "SwissRoll",
    "cifar10",
    "digits",
    "fashion_mnist",
    "folder",
    "mnist",
    "plane_dataset",
    "with_validation",
]
