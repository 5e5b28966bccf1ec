"""The ring of the paper written out literally, in float64, as an oracle for the layer.

Equations as in arXiv 2002.05712, section 3: ν is the second moment, compensated statistics are first-order Taylor steps
whose derivatives come from torch.autograd.grad on the producing layer itself, and past weights are stored. The
projection form stands beside it. Nothing here is shared with the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (y, weight, bias) -> x


class ReferenceCBN:
    """State of one layer: running statistics and a list of past iterations.

    `apply(y, weight, bias)` is the producing conv or linear. Call with tensors that require grad as wanted; autograd
    does the backward pass.
    """

    def __init__(
        self,
        apply: Apply,
        channels: int,
        window: int,
        compensation: str = "projection",
        gradient: str = "full",
        burn_in: int = 0,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        self.apply, self.window, self.compensation, self.gradient = apply, window, compensation, gradient
        self.burn_in, self.eps, self.momentum = burn_in, eps, momentum
        self.past: list[dict[str, Tensor]] = []
        self.iteration = 0
        self.running_mean = torch.zeros(channels, dtype=torch.float64)
        self.running_var = torch.ones(channels, dtype=torch.float64)

    def __call__(self, y: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor) -> Tensor:
        x = self.apply(y, weight, bias)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mu, nu = x.mean(dims), (x * x).mean(dims)

        past = self.past if self.iteration >= self.burn_in else []
        mus, nus = [mu], [nu]
        for entry in past:
            mu_past, nu_past = self._compensated(entry, weight, bias)
            if self.gradient == "current":
                mu_past, nu_past = mu_past.detach(), nu_past.detach()
            mus.append(mu_past)
            nus.append(nu_past)
        M = sum(mus) / len(mus)
        sigma2 = sum(nus) / len(nus) - M * M
        x_hat = (x - M.view(shape)) / torch.sqrt(sigma2.view(shape) + self.eps)

        count = x.numel() / x.shape[1] * len(mus)
        self.running_mean += self.momentum * (M.detach() - self.running_mean)
        self.running_var += self.momentum * (sigma2.detach() * count / (count - 1) - self.running_var)
        self._record(y, weight, bias)
        self.iteration += 1
        return x_hat * gamma.view(shape) + beta.view(shape)

    def _compensated(self, entry: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        mu, nu = entry["mu"], entry["nu"]
        if self.compensation == "none":
            return mu, nu
        delta = weight - entry["weight"]
        delta_b = torch.zeros_like(mu) if bias is None else bias - entry["bias"]
        mu_t = mu + (entry["dmu"] * delta).flatten(1).sum(1) + delta_b
        if self.compensation == "taylor":
            nu_t = nu + (entry["dnu"] * delta).flatten(1).sum(1) + 2 * mu * delta_b
            return mu_t, torch.maximum(nu_t, mu_t**2)
        b, b_then = (torch.zeros_like(mu), torch.zeros_like(mu)) if bias is None else (bias, entry["bias"])
        cov = (weight * entry["dnu"]).flatten(1).sum(1) / 2 + b * mu - mu_t * mu
        # its own variance: what Cauchy-Schwarz' bound divides by
        cov_then = (entry["weight"] * entry["dnu"]).flatten(1).sum(1) / 2 + b_then * mu - mu * mu
        return mu_t, (nu - mu**2) * (cov / cov_then) ** 2 + mu_t**2

    def _record(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        with torch.enable_grad():
            w = weight.detach().clone().requires_grad_()
            b = None if bias is None else bias.detach().clone()
            x = self.apply(y.detach(), w, b)
            dims = [d for d in range(x.dim()) if d != 1]
            mu, nu = x.mean(dims), (x * x).mean(dims)
            # each channel's statistic depends on its own filter only, so the gradient of the sum holds every row
            (dmu,) = torch.autograd.grad(mu.sum(), w, retain_graph=True)
            (dnu,) = torch.autograd.grad(nu.sum(), w)
        entry = {"mu": mu.detach(), "nu": nu.detach(), "dmu": dmu, "dnu": dnu, "weight": w.detach()}
        if b is not None:
            entry["bias"] = b
        self.past = [*self.past, entry][-(self.window - 1) :] if self.window > 1 else []
