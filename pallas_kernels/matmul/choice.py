"""Which kernel a product gets, and with which tiles: one function of its shape and scheme.

The ops ask it, and so do the benchmark, the tests and the docs. Whether the device has kernels at all is for
`backend.resolve` to say.
"""

import dataclasses
from typing import Any

from pallas_kernels.matmul import config
from pallas_kernels.matmul.many_rows import COLUMNS
from pallas_kernels.matmul.schemes import Scheme

MANY = 128
"""Rows of a tile from which on the kernel of many rows is taken. Shorter ones are bound by reading the weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """Rows [rows, depth] times the transpose of a weight [columns, depth], or of one of several experts' weights.

    Attributes:
      rows: of all tiles.
      columns, depth: N and K.
      scheme: of the weight, or of the two weights with SwiGLU behind them.
      tiles: of rows, each with an expert's weight; None: there is one weight.
      row_dtype: of the rows before they are quantised.
      weight_dtype: of stored values; "" for that of the scheme.
      quantize_input: see `matmul`.
      swiglu: whether two weights share the rows, with SwiGLU behind.
    """

    rows: int
    columns: int
    depth: int
    scheme: Scheme
    tiles: int | None = None
    row_dtype: str = "bfloat16"
    weight_dtype: str = ""
    quantize_input: bool = True
    swiglu: bool = False

    @property
    def tile(self) -> int | None:
        """Rows of a tile; None without experts, 0 if there are no tiles."""
        return None if self.tiles is None else self.rows // max(1, self.tiles)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `choose` says.

    Attributes:
      kernel: "few_rows", "many_rows", or None: plain `jax.numpy`.
      config: the kernel's tiles.
      unsupported: what no kernel takes, and what one would take; None if one takes all.
      by_intent: plain `jax.numpy` is meant for these: "auto" takes it without a warning.
    """

    kernel: str | None = None
    config: Any = None
    unsupported: str | None = None
    by_intent: bool = False

    @property
    def many(self) -> bool:
        return self.kernel == "many_rows"


def choose(product: Product) -> Choice:
    """Returns the kernel of a product and its tiles.

    Few rows are bound by reading the weights once, which the kernel of few rows does at the speed of memory; many rows
    by the tensor cores. What both take, in tiles of `MANY` rows or more, goes to the latter.
    """
    if product.scheme.left_to_xla(product.quantize_input, product.tiles is not None) and not product.swiglu:
        return Choice(by_intent=True)
    refused = _refused_by_both(product)
    few = refused or _refused_by_few_rows(product)
    many = refused or _refused_by_many_rows(product)
    long = product.tile is not None and product.tile >= MANY
    if few is None and not (long and many is None):
        return Choice("few_rows", _few_rows_config(product))
    if many is None:
        return Choice("many_rows", _many_rows_config(product))
    reason = few if few and (product.scheme.many_rows is None or _tile_is_short(product)) else many
    too_many = product.scheme.many_rows is None and product.tiles is None and product.rows > product.scheme.few_most
    return Choice(unsupported=reason, by_intent=too_many)


def tile_rows(scheme: Scheme, columns: int, depth: int) -> int:
    """Returns the rows of the smallest tiles that a kernel takes for experts' weights [columns, depth] of a scheme."""
    smallest = config.TILES[0]
    product = Product(rows=smallest, columns=columns, depth=depth, scheme=scheme, tiles=1)
    return smallest if _refused_by_few_rows(product) is None else 64


def _tile_is_short(product: Product) -> bool:
    return product.tile is not None and product.tile % 64 != 0 and product.scheme.few_rows is not None


def _refused_by_both(product: Product) -> str | None:
    scheme, dtype = product.scheme, product.row_dtype
    if (reason := scheme.unquantized(product.quantize_input)) is not None:
        return reason
    if product.swiglu and product.rows == 0:
        return f"rows {(product.rows, product.depth)}; it takes one or more"
    one, several = scheme.row_dtypes, scheme.grouped_row_dtypes
    taken = ("bfloat16",) if product.swiglu else one if product.tiles is None else several
    if dtype not in taken:
        kind = "x of dtype" if product.tiles is None and not product.swiglu else "rows of"
        return f"{kind} {dtype}; it takes {' and '.join(taken)}"
    if product.swiglu and product.columns % 128:
        return f"weights {_weight(product)}; it takes [..., W, K] with W a multiple of 128"
    return None


def _refused_by_few_rows(product: Product) -> str | None:
    """Returns what the kernel of few rows does not take, and what it takes; None if it takes all."""
    scheme, tile = product.scheme, product.tile
    if scheme.few_rows is None:
        return f"weights in {scheme}"
    if product.columns % 64 or product.depth % scheme.few_depth:
        return (
            f"weights of shape {_weight(product)}; it takes N in multiples of 64 and K in multiples of "
            f"{scheme.few_depth}"
        )
    most = config.SWIGLU_TILES[-1] if product.swiglu else scheme.few_most
    if tile is None:
        if not 1 <= product.rows <= most:
            return f"x of shape {(product.rows, product.depth)}; it takes 1 to {most} rows"
        return None
    tiles = config.SWIGLU_TILES if product.swiglu else scheme.few_tiles
    in_parts = scheme.many_rows is None and tile > 0 and tile % tiles[-1] == 0
    if tile in tiles or in_parts:
        return None
    parts = f" and multiples of {tiles[-1]}" if scheme.many_rows is None else ""
    return f"tiles of {tile} rows; it takes {', '.join(map(str, tiles))}{parts}"


def _refused_by_many_rows(product: Product) -> str | None:
    """Returns what the kernel of many rows does not take, and what it takes; None if it takes all."""
    scheme, step = product.scheme, product.scheme.many_depth
    columns, depth, weight_dtype = product.columns, product.depth, scheme.dtypes[0]
    if scheme.many_rows is None:
        return f"weights in {scheme}"
    if product.row_dtype != "bfloat16":
        return f"rows of {product.row_dtype}; it takes bfloat16"
    if product.weight_dtype not in ("", weight_dtype):
        return f"weights of {product.weight_dtype}; it takes {weight_dtype}"
    if columns == 0 or columns % 64 or depth == 0 or depth % step:
        return f"weights {_weight(product)}; it takes [..., N, K] with N a multiple of 64 and K of {step}"
    if product.tile is not None and (product.tile == 0 or product.tile % 64):
        return f"tiles of {product.tile} rows; it takes multiples of 64"
    if -(-product.rows // 128) * -(-columns // COLUMNS) * (depth // step) >= 2**31:
        return (
            f"{product.rows} rows times weights {_weight(product)}; steps of the whole product must number less than "
            "2^31"
        )
    return None


def _weight(product: Product) -> tuple[int, int]:
    return product.columns, product.depth


def _few_rows_config(product: Product) -> Any:
    tile, tiles = product.tile, 1 if product.tiles is None else product.tiles
    if tile is None:
        tile = next(tile for tile in config.TILES if tile >= product.rows)
    if product.swiglu:
        return config.few_rows_swiglu(tile, product.columns, tiles)
    tile = min(tile, product.scheme.few_tiles[-1])
    return product.scheme.few_rows_config(tile, product.columns, tiles, product.depth)


def _many_rows_config(product: Product) -> config.ManyRows:
    columns = 2 * product.columns if product.swiglu else product.columns
    return config.many_rows(product.rows, columns, product.tile, by_rows=product.scheme.by_rows)
