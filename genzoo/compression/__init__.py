"""Lossless compression of images by trained models."""

from genzoo.compression.codes import check_compressible as check_compressible
from genzoo.compression.codes import kind_of_code as kind_of_code
from genzoo.compression.compress import Compressed as Compressed
from genzoo.compression.compress import Decompressed as Decompressed
from genzoo.compression.compress import check as check
from genzoo.compression.compress import compress as compress
from genzoo.compression.compress import decompress as decompress
from genzoo.compression.compress import fits as fits
from genzoo.compression.container import SUFFIX as SUFFIX
from genzoo.compression.container import Container as Container
