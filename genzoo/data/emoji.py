r"""Emoji with their names as captions, from the bitmaps of a colour font: ``data=emoji``.

    picture                 caption
    a code point            its Unicode name in lower case, "grinning face"
    with a skin tone        "waving hand sign, medium skin tone"
    two regional letters    "flag of japan"
    a keycap                "keycap digit one"

In Unicode names of symbols "black" and "white" stand for filled and outlined, which the colours of emoji contradict: they are
omitted there, as in "sun with rays". Longer sequences, of several people or of professions, are not read. Of equal
pictures the first one is kept, and code points without a name are skipped.

The test split is chosen by a hash of the caption without its skin tone, so that all tones of a hand are on one side.

References:
    Davis, Holbrook, "Unicode Emoji", Unicode Technical Standard 51, https://www.unicode.org/reports/tr51/ (sequences,
    section 1.4.5).
    Google, "Noto Emoji", https://github.com/googlefonts/noto-emoji.
"""

from __future__ import annotations

import os
import re
import unicodedata
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from genzoo.data.captions import captioned
from genzoo.data.dataset import DataError, DataSet
from genzoo.data.fonts import FontError, colour_bitmaps
from genzoo.data.layout import unit_hash

if TYPE_CHECKING:
    from PIL import Image

DEBIAN_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"  # Debian's package fonts-noto-color-emoji
REMEDY = "install Debian's package fonts-noto-color-emoji, or set data.font=FILE of a font with colour bitmaps"
FONT_BYTES = 2**26  # of a font; that of Debian has 11 million
BITMAP = 512  # pixels of the longest side of a bitmap
TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
KEYCAP = 0x20E3
LETTER_A = 0x1F1E6  # regional indicator
# Names that differ from those of Unicode, where its colours are wrong or two names would coincide.
NAMES = {
    0x2705: "check mark button",
    0x2753: "red question mark",
    0x2754: "white question mark",
    0x2755: "white exclamation mark",
    0x2757: "red exclamation mark",
    0x2764: "red heart",
    0x1F325: "sun behind large cloud",
    **{tone: f"{name} skin tone" for tone, name in TONES.items()},
}
# Names of Unicode 15, which Python has from version 3.12 on.
NAMES |= {
    0x1F6DC: "wireless",
    0x1FA75: "light blue heart",
    0x1FA76: "grey heart",
    0x1FA77: "pink heart",
    0x1FA87: "maracas",
    0x1FA88: "flute",
    0x1FAAD: "folding hand fan",
    0x1FAAE: "hair pick",
    0x1FAAF: "khanda",
    0x1FABB: "hyacinth",
    0x1FABC: "jellyfish",
    0x1FABD: "wing",
    0x1FABF: "goose",
    0x1FACE: "moose",
    0x1FACF: "donkey",
    0x1FADA: "ginger root",
    0x1FADB: "pea pod",
    0x1FAE8: "shaking face",
    0x1FAF7: "leftwards pushing hand",
    0x1FAF8: "rightwards pushing hand",
}
# Ranges in which "black" and "white" are no colours, except of circles and squares.
SYMBOLS = ((0x2300, 0x2BFF), (0x1F0CF, 0x1F0CF), (0x1F324, 0x1F326), (0x1F446, 0x1F449))
# Names of the regions of ISO 3166-1, and of those that Unicode adds.
REGIONS = dict(
    entry.split(" ", 1)
    for entry in """\
AC ascension island, AD andorra, AE united arab emirates, AF afghanistan, AG antigua and barbuda, AI anguilla, AL
albania, AM armenia, AO angola, AQ antarctica, AR argentina, AS american samoa, AT austria, AU australia, AW aruba, AX
aland islands, AZ azerbaijan, BA bosnia and herzegovina, BB barbados, BD bangladesh, BE belgium, BF burkina faso, BG
bulgaria, BH bahrain, BI burundi, BJ benin, BL saint barthelemy, BM bermuda, BN brunei, BO bolivia, BQ caribbean
netherlands, BR brazil, BS bahamas, BT bhutan, BV bouvet island, BW botswana, BY belarus, BZ belize, CA canada, CC
cocos islands, CD democratic republic of the congo, CF central african republic, CG republic of the congo, CH
switzerland, CI ivory coast, CK cook islands, CL chile, CM cameroon, CN china, CO colombia, CP clipperton island, CR
costa rica, CU cuba, CV cape verde, CW curacao, CX christmas island, CY cyprus, CZ czech republic, DE germany, DG
diego garcia, DJ djibouti, DK denmark, DM dominica, DO dominican republic, DZ algeria, EA ceuta and melilla, EC
ecuador, EE estonia, EG egypt, EH western sahara, ER eritrea, ES spain, ET ethiopia, EU european union, FI finland, FJ
fiji, FK falkland islands, FM micronesia, FO faroe islands, FR france, GA gabon, GB united kingdom, GD grenada, GE
georgia, GF french guiana, GG guernsey, GH ghana, GI gibraltar, GL greenland, GM gambia, GN guinea, GP guadeloupe, GQ
equatorial guinea, GR greece, GS south georgia and the south sandwich islands, GT guatemala, GU guam, GW guinea-
bissau, GY guyana, HK hong kong, HM heard island and mcdonald islands, HN honduras, HR croatia, HT haiti, HU hungary,
IC canary islands, ID indonesia, IE ireland, IL israel, IM isle of man, IN india, IO british indian ocean territory,
IQ iraq, IR iran, IS iceland, IT italy, JE jersey, JM jamaica, JO jordan, JP japan, KE kenya, KG kyrgyzstan, KH
cambodia, KI kiribati, KM comoros, KN saint kitts and nevis, KP north korea, KR south korea, KW kuwait, KY cayman
islands, KZ kazakhstan, LA laos, LB lebanon, LC saint lucia, LI liechtenstein, LK sri lanka, LR liberia, LS lesotho,
LT lithuania, LU luxembourg, LV latvia, LY libya, MA morocco, MC monaco, MD moldova, ME montenegro, MF saint martin,
MG madagascar, MH marshall islands, MK north macedonia, ML mali, MM myanmar, MN mongolia, MO macau, MP northern
mariana islands, MQ martinique, MR mauritania, MS montserrat, MT malta, MU mauritius, MV maldives, MW malawi, MX
mexico, MY malaysia, MZ mozambique, NA namibia, NC new caledonia, NE niger, NF norfolk island, NG nigeria, NI
nicaragua, NL netherlands, NO norway, NP nepal, NR nauru, NU niue, NZ new zealand, OM oman, PA panama, PE peru, PF
french polynesia, PG papua new guinea, PH philippines, PK pakistan, PL poland, PM saint pierre and miquelon, PN
pitcairn islands, PR puerto rico, PS palestine, PT portugal, PW palau, PY paraguay, QA qatar, RE reunion, RO romania,
RS serbia, RU russia, RW rwanda, SA saudi arabia, SB solomon islands, SC seychelles, SD sudan, SE sweden, SG
singapore, SH saint helena, SI slovenia, SJ svalbard and jan mayen, SK slovakia, SL sierra leone, SM san marino, SN
senegal, SO somalia, SR suriname, SS south sudan, ST sao tome and principe, SV el salvador, SX sint maarten, SY syria,
SZ eswatini, TA tristan da cunha, TC turks and caicos islands, TD chad, TF french southern territories, TG togo, TH
thailand, TJ tajikistan, TK tokelau, TL east timor, TM turkmenistan, TN tunisia, TO tonga, TR turkey, TT trinidad and
tobago, TV tuvalu, TW taiwan, TZ tanzania, UA ukraine, UG uganda, UM us outlying islands, UN united nations, US united
states, UY uruguay, UZ uzbekistan, VA vatican city, VC saint vincent and the grenadines, VE venezuela, VG british
virgin islands, VI us virgin islands, VN vietnam, VU vanuatu, WF wallis and futuna, WS samoa, XK kosovo, YE yemen, YT
mayotte, ZA south africa, ZM zambia, ZW zimbabwe""".replace("\n", " ").split(", ")
)


class Glyph(NamedTuple):
    """A bitmap of a font.

    Attributes:
        base: caption without a skin tone.
        caption: of the picture.
        png: the bitmap.
    """

    base: str
    caption: str
    png: bytes


def emoji(
    font: str | Path = DEBIAN_FONT,
    size: int = 32,
    test_fraction: float = 0.1,
    vocabulary: int = 1024,
    text_length: int | None = 24,
) -> DataSet:
    """Load the emoji of a font, on white.

    Args:
        font: file of a font with colour bitmaps, such as Noto Color Emoji.
        size: side of the pictures in pixels.
        test_fraction: expected fraction of test pictures, in (0, 1).
        vocabulary, text_length: of the captions' tokens, as in ``genzoo.data.captions.captioned``.

    Raises:
        DataError: for a missing or damaged font, one without colour bitmaps, and an empty split.
    """
    if size < 1 or not 0 < test_fraction < 1:
        raise DataError(f"data.size={size}, data.test_fraction={test_fraction}: must be positive, the latter below 1")
    path = Path(font).expanduser()
    seen: set[bytes] = set()
    found: dict[bool, list[tuple[str, np.ndarray]]] = {False: [], True: []}
    repeated = 0
    for glyph in sorted(_glyphs(path, _read(path)), key=lambda glyph: glyph.caption):
        picture = _on_white(path, glyph)
        content = picture.tobytes()
        if content in seen:
            repeated += 1
            continue
        seen.add(content)
        small = np.asarray(_resized(picture, size)).transpose(2, 0, 1)
        found[unit_hash(PurePosixPath(glyph.base)) < test_fraction].append((glyph.caption, small))
    if not found[False] or not found[True]:
        raise DataError(
            f"data.font={path}: {len(found[False])} training and {len(found[True])} test pictures: use another font, or change "
            f"data.test_fraction={test_fraction:g}"
        )
    train, test = (
        (torch.from_numpy(np.stack([x for _, x in part])), [caption for caption, _ in part])
        for part in (found[False], found[True])
    )
    note = (
        f"{path}: {len(train[1])} training and {len(test[1])} test pictures of emoji; {repeated} repeated ones left out"
    )
    return captioned(train, test, vocabulary=vocabulary, length=text_length, notes=[note])


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise DataError(f"data.font={path}: is not a file; {REMEDY}")
        with open(path, "rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, FONT_BYTES) + 1)
    except OSError as error:
        raise DataError(f"data.font={path}: cannot be read ({error}); {REMEDY}") from error
    if len(content) > FONT_BYTES:
        raise DataError(f"data.font={path}: has more than {FONT_BYTES} bytes; {REMEDY}")
    return content


def _glyphs(path: Path, content: bytes) -> list[Glyph]:
    """Read all named bitmaps of a font."""
    try:
        bitmaps = colour_bitmaps(content)
    except FontError as error:
        raise DataError(f"data.font={path}: {error}; {REMEDY}") from error
    return [Glyph(*names, png) for points, png in bitmaps.items() if (names := _named(points))]


def _named(points: tuple[int, ...]) -> tuple[str, str] | None:
    """Name a sequence of code points: without its skin tone, and with it; None for sequences without a name."""
    names = [_name(point) for point in points]
    if len(points) == 1:
        return (names[0], names[0]) if names[0] else None
    if not names[0]:
        return None
    letters = [chr(point - LETTER_A + ord("A")) for point in points if 0 <= point - LETTER_A < 26]
    if len(letters) == 2 and "".join(letters) in REGIONS:
        name = f"flag of {REGIONS[''.join(letters)]}"
        return name, name
    if points[1] in TONES:
        return names[0], f"{names[0]}, {TONES[points[1]]} skin tone"
    if points[1] == KEYCAP:
        return f"keycap {names[0]}", f"keycap {names[0]}"
    return None


def _name(point: int) -> str:
    """Name a code point; empty without a name."""
    if point in NAMES:
        return NAMES[point]
    name = unicodedata.name(chr(point), "").lower().removeprefix("emoji component ")
    if any(low <= point <= high for low, high in SYMBOLS) and not re.search(r" (circle|square)$", name):
        name = re.sub(r"\b(black|white) ", "", name)
    return name


def _on_white(path: Path, glyph: Glyph) -> Image.Image:
    """Decode a bitmap, blended with white and padded to a square."""
    from PIL import Image

    try:
        with Image.open(BytesIO(glyph.png), formats=("PNG",)) as file:
            if max(file.size) > BITMAP:
                raise ValueError(f"{file.size[0]}x{file.size[1]} pixels, at most {BITMAP} are read")
            bitmap = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"data.font={path}: the bitmap of {glyph.caption!r} is not readable ({error})") from error
    side = max(bitmap.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
    return square.convert("RGB")


def _resized(picture: Image.Image, size: int) -> Image.Image:
    from PIL import Image

    return picture.resize((size, size), Image.Resampling.LANCZOS)
