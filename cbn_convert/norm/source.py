"""What feeds some channels of a norm layer, and the past of those channels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .distributed import joined_mean
from .functional import Compensation, Moments, by_group, per_channel, response
from .history import History
from .moments import InputPatches
from .producers import Producer, fan_in, groups_of, is_linear, theta_and_bias
from .tap import InputTap


class Source:
    """Channels of a norm layer that have one window: all of them, or those that one of several modules made.

    tap: on the module whose weight made them, None where no weight did. channels: which of the layer's, None for all.
    """

    def __init__(self, history: History, tap: InputTap | None = None, channels: slice | None = None) -> None:
        self.history = history
        self.tap = tap
        self.channels = channels

    def of(self, values: Tensor | None) -> Tensor | None:
        """This source's part of a tensor [C]."""
        return values if values is None or self.channels is None else values[self.channels]

    def of_input(self, x: Tensor) -> Tensor:
        """This source's part of x [N, C, ...]."""
        return x if self.channels is None else x[:, self.channels]

    def history_bytes(self, channels: int, compensation: Compensation) -> int:
        """What a full window takes in float32, for a layer of so many channels."""
        count = len(range(channels)[self.channels or slice(None)])
        numbers = 2 * count  # mean and var
        if self.tap is not None and self.tap.followed:
            fan, groups = fan_in(self.tap.module), groups_of(self.tap.module)
            numbers += 2 * count + groups * fan + (groups * fan * fan if compensation == "exact" else count * fan)
        return 4 * numbers * self.history.capacity

    def taken(self, x: Tensor, needed: bool) -> tuple[Producer | None, Tensor | None]:
        """The module whose weight is to be followed, if there is one, and the input of which it made x [N, C, ...].

        Raises RuntimeError if x is not what it made, or, where that is `needed`, if it has not run.
        """
        if self.tap is None:
            return None, None
        source_input = self.tap.take()
        if not self.tap.followed:
            return None, source_input
        if needed and source_input is None:
            raise RuntimeError(
                f"a norm layer is bound to a {type(self.tap.module).__name__} that has not run since the last forward "
                "pass; bind it to the module that produces its input, or leave it unbound"
            )
        self.tap.check_output(x)
        return self.tap.module, source_input

    def theta_and_bias(self, module: Producer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """θ [C, F] and b [C] of these channels, as `producers.theta_and_bias`."""
        theta, bias = theta_and_bias(module, dtype)
        if self.tap is None or self.tap.rows is None:
            return theta, bias
        return theta[self.tap.rows], None if bias is None else bias[self.tap.rows]

    def with_patches(
        self,
        moments: Moments,
        module: Producer,
        y: Tensor,
        x: Tensor,
        theta: Tensor,
        bias: Tensor | None,
        compensation: Compensation,
        at_most: int | None,
        turn: int,
        ranks: int,
    ) -> Moments:
        """Adds what compensation will need: `module` made x from y with θ [C, F] and bias [C].

        at_most, turn: as in `InputPatches`. Means are over all ranks.
        """
        dtype = moments.mean.dtype
        patches = InputPatches(module, y, x.shape[2:], dtype, at_most, turn)
        joined = partial(joined_mean, count=patches.positions) if ranks > 1 else _as_it_is
        patch_mean = joined(patches.mean())
        anchor = response(patch_mean[:, None], theta, bias).squeeze(1)
        moments = moments._replace(anchor=anchor, patch_mean=patch_mean)
        if compensation == "exact":
            patch_covariance = joined(patches.covariance(patch_mean))
            rows = by_group(theta, len(patch_mean))
            explained = torch.linalg.vecdot(rows @ patch_covariance, rows).flatten()
            return moments._replace(patch_covariance=patch_covariance, explained=explained)
        xs = patches.outputs(x).to(dtype)
        xc = xs - (anchor[:, None] if is_linear(module) else per_channel(anchor, xs))
        # what rounding left of the mean would be multiplied by a patch mean that may be large
        axes = [1] if is_linear(module) else [0, *range(2, xc.dim())]
        rest = by_group(joined(xc.mean(axes)), len(patch_mean))
        covariance = joined(patches.covariance_with(xc))
        by_group(covariance, len(patch_mean)).baddbmm_(rest[:, :, None], patch_mean[:, None], alpha=-1)
        return moments._replace(covariance=covariance, explained=torch.linalg.vecdot(covariance, theta))


def _as_it_is(t: Tensor) -> Tensor:
    return t
