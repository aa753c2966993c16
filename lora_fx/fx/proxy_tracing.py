"""The recording of a run as a graph: torch's `make_fx`, and its recording mode.

`get_proxy_mode` gives the mode that writes, and `get_proxy_slot` the node of a tensor.
"""

from __future__ import annotations

from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx

__all__ = ["get_proxy_mode", "get_proxy_slot", "make_fx"]
