"""The kernels of mixture-of-experts dispatch on Hopper, one file a step."""

from pallas_kernels.moe_dispatch.planning import make_plan
from pallas_kernels.moe_dispatch.routing import Routing, route
from pallas_kernels.moe_dispatch.rows import combine, gather_rows

__all__ = ["Routing", "combine", "gather_rows", "make_plan", "route"]
