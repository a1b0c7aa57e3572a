"""The table of abilities in the README is that of the families under ``conf/model/``."""

from __future__ import annotations

import functools

import pytest

from genzoo.abilities import ABILITIES, ability_table
from genzoo.config.instantiate import build
from genzoo.latents import can_encode
from genzoo.model import Codec, Compressible, Decoder, GenerativeModel
from tests.captions import SQUARES
from tests.commands import described
from tests.conftest import CAPTIONED, FAMILIES, suitable
from tests.test_docs import README

TABLE = README.partition("### What each family can do\n\n")[2].partition("\n\n")[0]


@functools.cache
def model(family: str) -> GenerativeModel:
    config = described(*([f"model={family}", *SQUARES] if family in CAPTIONED else suitable(family, "digits")))
    return build(config["model"], "model")


def test_the_table_of_the_readme_is_true():
    expected = ability_table({family: model(family) for family in FAMILIES})
    assert expected == TABLE, f"replace the table of the README by:\n{expected}"


@pytest.mark.parametrize("family", FAMILIES)
def test_abilities_follow_from_what_a_model_inherits(family):
    abilities = {name: ability(model(family)) for name, ability in ABILITIES.items()}
    assert bool(abilities["encode, reconstruct"]) == can_encode(model(family))
    assert bool(abilities["decode"]) >= isinstance(model(family), Decoder)
    assert bool(abilities["encode, reconstruct"]) >= isinstance(model(family), Codec)
    assert bool(abilities["compress"]) == isinstance(model(family), Compressible)
    assert bool(abilities["attribute"]) == (bool(abilities["interpolate"]) and can_encode(model(family)))


def test_the_families_differ_in_their_abilities():
    rows = {tuple(ability(model(family)) for ability in ABILITIES.values()) for family in FAMILIES}
    assert len(rows) >= 6  # VAEs, VQ-VAE, flows, diffusion, latent, GANs, autoregressive
    assert {ABILITIES["interpolate"](model(family)) for family in FAMILIES} == {"", "linear", "spherical"}


if __name__ == "__main__":
    print(ability_table({family: model(family) for family in FAMILIES}))
