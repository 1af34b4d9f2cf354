"""Mamba-3 as its formulas read, one step after the other: the truth that the tests hold the fast form to.

Source: the Mamba-3 paper, and ``mamba_ssm/modules/mamba3.py``, ``tests/ops/triton/test_mamba3_siso.py`` and
``tests/ops/tilelang/test_mamba3_mimo.py`` of state-spaces/mamba for what the paper leaves open (names, order, floors,
the tanh of the rates).

Legend: s sequence, b batch, h hidden, H heads, P channels of a head, G groups, N state channels, S rotated pairs, R
inputs and outputs of a head at each step (MIMO).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from megacpp_stp.model.mamba3.inputs import ScanInputs

NORM_EPS = 1e-5
DECAY_FLOOR = 1e-4


def reference_scan(inputs: ScanInputs) -> Tensor:
    """The recurrence, per head, for t = 1 .. s from an empty state::

        theta_t = theta_(t-1) + dt_t pi tanh(angle_t)
        k_t     = R(theta_t) (B_t + B_bias)            q_t = R(theta_t) (C_t + C_bias)
        alpha_t = exp(log_decay_t)                     gamma_t = trap_t dt_t
                                                       beta_t = (1 - trap_t) dt_t alpha_t
        h_t     = alpha_t h_(t-1) + beta_t x_(t-1) k_(t-1)^T + gamma_t x_t k_t^T
        y_t     = (h_t q_t + D x_t) silu(z_t)

    h is P by N. R(theta) turns the first S pairs of neighbouring channels, pair i by theta[i], and leaves the rest:
    the complex state transition, moved into k and q. Without angles R is the identity. The trapezoidal rule is
    gamma and beta; trap 1 is the rule of Mamba-2.

    Args:
        inputs: Any floating dtype; fp64 for the truth.

    Returns:
        y, [s, b, H, P], in ``inputs.compute_dtype``.
    """
    i = inputs.to(inputs.compute_dtype)
    s, b, H, P = i.x.shape
    serves = H // i.B.shape[2]
    state = i.x.new_zeros(b, H, P, i.B.shape[3])
    k_before, x_before = i.x.new_zeros(b, H, i.B.shape[3]), i.x.new_zeros(b, H, P)
    theta = i.x.new_zeros(b, H, 0 if i.angle is None else i.angle.shape[-1])
    y = []
    for t in range(s):
        k = i.B[t].repeat_interleave(serves, dim=1) + i.B_bias
        q = i.C[t].repeat_interleave(serves, dim=1) + i.C_bias
        if i.angle is not None:
            theta = theta + i.dt[t].unsqueeze(-1) * math.pi * torch.tanh(i.angle[t]).unsqueeze(1)
            k, q = rotate_pairs(k, theta), rotate_pairs(q, theta)
        alpha = torch.exp(i.log_decay[t])
        gamma = i.trap[t] * i.dt[t]
        beta = (1 - i.trap[t]) * i.dt[t] * alpha
        state = (
            alpha[..., None, None] * state
            + beta[..., None, None] * x_before.unsqueeze(-1) * k_before.unsqueeze(-2)
            + gamma[..., None, None] * i.x[t].unsqueeze(-1) * k.unsqueeze(-2)
        )
        read = (state * q.unsqueeze(-2)).sum(-1) + i.D[:, None] * i.x[t]
        y.append(read * silu(i.z[t]))
        k_before, x_before = k, i.x[t]
    return torch.stack(y)


def reference_mimo_scan(inputs: ScanInputs) -> Tensor:
    """The recurrence, per head, for t = 1 .. s from an empty state, with r and r' from 1 to R::

        x_(t,r) = mimo_x_r x_t                         z_(t,r) = mimo_z_r z_t
        k_(t,r) = R(theta_t) (B_(t,r) + B_bias_r)      q_(t,r) = R(theta_t) (C_(t,r) + C_bias_r)
        h_t     = alpha_t h_(t-1) + beta_t sum_r x_(t-1,r) k_(t-1,r)^T + gamma_t sum_r x_(t,r) k_(t,r)^T
        y_t     = sum_r mimo_o_r (h_t q_(t,r) + D x_(t,r)) silu(z_(t,r))

    Products with mimo_x, mimo_z, mimo_o are channel by channel; theta, alpha, beta, gamma as in `reference_scan`.  The
    state h is P by N, whatever R is.

    Args:
        inputs: Any floating dtype; fp64 for the truth.

    Returns:
        y, [s, b, H, P], in ``inputs.compute_dtype``.
    """
    i = inputs.to(inputs.compute_dtype)
    assert i.mimo_x is not None and i.mimo_z is not None and i.mimo_o is not None
    s, b, H, P = i.x.shape
    serves = H // i.B.shape[2]
    state = i.x.new_zeros(b, H, P, i.B.shape[-1])
    written_before = torch.zeros_like(state)
    theta = i.x.new_zeros(b, H, 0 if i.angle is None else i.angle.shape[-1])
    y = []
    for t in range(s):
        k = i.B[t].repeat_interleave(serves, dim=1) + i.B_bias
        q = i.C[t].repeat_interleave(serves, dim=1) + i.C_bias
        if i.angle is not None:
            theta = theta + i.dt[t].unsqueeze(-1) * math.pi * torch.tanh(i.angle[t]).unsqueeze(1)
            k, q = rotate_pairs(k, theta.unsqueeze(2)), rotate_pairs(q, theta.unsqueeze(2))
        x, z = i.x[t].unsqueeze(2) * i.mimo_x, i.z[t].unsqueeze(2) * i.mimo_z
        alpha, gamma = torch.exp(i.log_decay[t]), i.trap[t] * i.dt[t]
        beta = (1 - i.trap[t]) * i.dt[t] * alpha
        written = torch.einsum("bhrp,bhrn->bhpn", x, k)
        state = (
            alpha[..., None, None] * state + beta[..., None, None] * written_before + gamma[..., None, None] * written
        )
        read = torch.einsum("bhpn,bhrn->bhrp", state, q) + i.D[:, None, None] * x
        y.append((i.mimo_o * read * silu(z)).sum(2))
        written_before = written
    return torch.stack(y)


def rotate_pairs(vectors: Tensor, theta: Tensor) -> Tensor:
    """Turn the first S pairs of neighbouring channels.

    Args:
        vectors: [..., N].
        theta: [..., S] in radians, S at most N / 2.

    Returns:
        [..., N]: (u, v) of pair i becomes (u cos - v sin, u sin + v cos) of theta[i]; channels from 2 S
        on stay as they were.
    """
    turned, rest = vectors.split([2 * theta.shape[-1], vectors.shape[-1] - 2 * theta.shape[-1]], dim=-1)
    u, v = turned.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = theta.cos(), theta.sin()
    return torch.cat([torch.stack([u * cos - v * sin, u * sin + v * cos], dim=-1).flatten(-2), rest], dim=-1)


def reference_mixer(hidden: Tensor, parameters: Mapping[str, Tensor], *, heads: int, groups: int) -> Tensor:
    """The whole mixer from its whole parameters, in one process and in the dtype of its inputs.

    ``[z, x, B, C, dt, A, trap] = in_proj(hidden)``, B and C to RMSNorm over N, ``dt = softplus(dt + dt_bias)``,
    ``A = min(-softplus(A), -1e-4)``, ``trap = sigmoid(trap)``, the scan, ``out_proj``.

    Args:
        hidden: [s, b, h].
        parameters: The mixer's, by their names in its state dict; ``angle_proj.weight`` only with rotation, ``mimo_x``
            and its like, and the dimension R of the biases, only with several inputs and outputs of a head.
        heads: H.
        groups: G.

    Returns:
        [s, b, h].
    """
    mimo = {name: parameters[name] for name in ("mimo_x", "mimo_z", "mimo_o") if name in parameters}
    vectors_of_group = parameters["B_bias"].shape[1:]
    keys = groups * vectors_of_group.numel()
    inner = parameters["out_proj.weight"].shape[1]
    projected = hidden @ parameters["in_proj.weight"].T
    z, x, B, C, dt, A, trap = projected.split([inner, inner, keys, keys, *[heads] * 3], dim=-1)

    def normed(vectors: Tensor, weight: Tensor) -> Tensor:
        vectors = vectors.unflatten(-1, (groups, *vectors_of_group))
        return vectors / torch.sqrt(vectors.square().mean(-1, keepdim=True) + NORM_EPS) * weight

    dt = softplus(dt + parameters["dt_bias"])
    scan = reference_mimo_scan if mimo else reference_scan
    y = scan(
        ScanInputs(
            x=x.unflatten(-1, (heads, -1)),
            z=z.unflatten(-1, (heads, -1)),
            B=normed(B, parameters["B_norm.weight"]),
            C=normed(C, parameters["C_norm.weight"]),
            dt=dt,
            log_decay=torch.clamp(-softplus(A), max=-DECAY_FLOOR) * dt,
            trap=torch.sigmoid(trap),
            B_bias=parameters["B_bias"],
            C_bias=parameters["C_bias"],
            D=parameters["D"],
            angle=hidden @ parameters["angle_proj.weight"].T if "angle_proj.weight" in parameters else None,
            **mimo,
        )
    )
    return y.flatten(2) @ parameters["out_proj.weight"].T
