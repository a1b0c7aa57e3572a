"""Writes small fonts with colour bitmaps, by fontTools."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import BigGlyphMetrics, SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17, cbdt_bitmap_format_18, cbdt_bitmap_format_19
from fontTools.ttLib.tables.E_B_L_C_ import BitmapSizeTable, SbitLineMetrics, Strike, eblc_sub_table_classes
from PIL import Image

IMAGES = {17: cbdt_bitmap_format_17, 18: cbdt_bitmap_format_18, 19: cbdt_bitmap_format_19}


def bitmap(seed: int, size: tuple[int, int] = (20, 18)) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 4), np.uint8)
    pixels[..., 3] = 255
    pixels[0, :, 3] = 0  # transparent
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()


def _metrics(kind: type) -> object:
    found = kind()
    for key in (
        "height", "width", "BearingX", "BearingY", "Advance", "horiBearingX", "horiBearingY", "horiAdvance",
        "vertBearingX", "vertBearingY", "vertAdvance",
    ):  # fmt: skip
        setattr(found, key, 20)
    return found


def made(
    path: Path, images: dict[tuple[int, ...], bytes], index: int = 1, image: int = 17, sizes: tuple[int, ...] = (20,)
) -> Path:
    """Write a font with a colour bitmap for each sequence of code points.

    Args:
        path: of the font.
        images: a PNG for each sequence.
        index, image: formats of CBLC and CBDT.
        sizes: of the strikes; those that are not the largest have other bitmaps.
    """
    names = {points: "_".join(f"u{point:X}" for point in points) for points in images}
    singles = sorted({point for points in images for point in points})
    glyphs = [".notdef", *(f"u{point:X}" for point in singles), *(n for p, n in names.items() if len(p) > 1)]
    builder = FontBuilder(128, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({point: f"u{point:X}" for point in singles})
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (128, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    rules = [
        "sub " + " ".join(f"u{point:X}" for point in points) + f" by {name};"
        for points, name in names.items()
        if len(points) > 1
    ]
    if rules:
        builder.addOpenTypeFeatures("feature ccmp {" + "\n".join(rules) + "} ccmp;")
    font = builder.font
    data, places = newTable("CBDT"), newTable("CBLC")
    data.version = places.version = 3.0
    data.strikeData, places.strikes = [], []
    for ppem in sizes:
        glyph_data = {}
        for points, png in images.items():
            glyph = IMAGES[image](b"", font)
            glyph.imageData = png if ppem == max(sizes) else b"small"
            glyph.metrics = _metrics(BigGlyphMetrics if image == 18 else SmallGlyphMetrics)
            glyph_data[names[points]] = glyph
        data.strikeData.append(glyph_data)
        strike, table, size = Strike(), eblc_sub_table_classes[index](b"", font), BitmapSizeTable()
        table.indexFormat, table.imageFormat = index, image
        table.imageSize, table.metrics = max(map(len, images.values())) + 12, _metrics(BigGlyphMetrics)
        table.names = sorted(names.values(), key=glyphs.index)
        strike.indexSubTables, strike.bitmapSizeTable = [table], size
        size.colorRef, size.flags, size.bitDepth, size.ppemX, size.ppemY = 0, 1, 32, ppem, ppem
        for direction in ("hori", "vert"):
            line = SbitLineMetrics()
            for key in (
                "ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset",
                "minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2",
            ):  # fmt: skip
                setattr(line, key, 0)
            setattr(size, direction, line)
        places.strikes.append(strike)
    font["CBDT"], font["CBLC"] = data, places
    font.save(path)
    return path
