"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of queries and keys, in two tensors or packed in one."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.rope import ref
from llm_kernels.rope.table import RopeTable
from llm_kernels.rows import fresh


def rope(
    q: Tensor,
    k: Tensor,
    table: RopeTable,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotated q and k, in one launch.

    q: [s, b, h, d], k: [s, b, g, d], any strides with d contiguous, fp32, bf16 or fp16; computed in fp32, returned
    contiguous in the same dtypes. rotary_dim: the first so many dims of a head rotate and the others are unchanged
    (partial rotary embedding); all by default. interleaved: pairs (2i, 2i + 1) as in GPT-J instead of (i, i + d/2) as
    in Llama. Backward rotates by the opposite angles and saves nothing but the table. Raises ValueError if shapes do
    not match each other or the table.
    """
    if k.ndim != 4 or q.ndim != 4 or k.shape[:2] != q.shape[:2] or k.size(3) != q.size(3):
        raise ValueError(f"k has shape {tuple(k.shape)}, q has {tuple(q.shape)}: only the number of heads may differ")
    _check(q, q.size(3), rotary_dim, table)
    if dispatch.backend_for(q, backend, k) == "torch":
        return ref.rope_table(q, table, interleaved), ref.rope_table(k, table, interleaved)
    return _turn(q, k, table.cos, table.sin, table.token_positions, table.offset, interleaved, False)


def rope_qkv_(
    qkv: Tensor,
    table: RopeTable,
    *,
    num_groups: int,
    head_dim: int,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rotates the queries and keys of a packed projection in place, and returns the projection.

    qkv: [s, b, w], w = num_groups (m + 2) head_dim: for every group m query heads, a key, a value, as megatron packs
    them. Both qkv and, in backward, its gradient are overwritten. So call it where nothing else needs either of them,
    such as between a linear layer and attention. rotary_dim and interleaved: as in rope. Raises ValueError if shapes do
    not match, or if qkv is a leaf that requires a gradient, expanded, or not contiguous in w.
    """
    group, rest = divmod(qkv.size(-1), num_groups * head_dim)
    if qkv.ndim != 3 or rest or group < 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; its last dim must hold {num_groups} groups of three or more heads of "
            f"{head_dim}"
        )
    if qkv.stride(2) != 1:
        raise ValueError(f"qkv has strides {qkv.stride()}; its last dim must be contiguous")
    dispatch.check_writable(qkv, "qkv", "rope_qkv_")
    _check(qkv, head_dim, rotary_dim, table)
    settings = table, num_groups, head_dim, interleaved, dispatch.backend_for(qkv, backend)
    return dispatch.apply(_RotatePacked, qkv, settings, False)


def _check(x: Tensor, dim: int, rotary_dim: int | None, table: RopeTable) -> None:
    tokens, rows, of_table = x.size(0), x.size(1), 2 * table.cos.size(1)
    if rotary_dim is None and of_table != dim:
        raise ValueError(
            f"heads are {dim} wide, the table is for {of_table}; rotary_dim={of_table} would rotate the first dims only"
        )
    if rotary_dim is not None and not of_table == rotary_dim <= dim:
        raise ValueError(f"rotary_dim = {rotary_dim}, but the table is for {of_table} and heads are {dim} wide")
    positions = table.token_positions
    if positions is None:
        _check_range(table.offset, table.offset + tokens - 1, table)
    elif positions.shape not in ((tokens,), (tokens, rows)):
        raise ValueError(
            f"positions have shape {tuple(positions.shape)}; [{tokens}] or [{tokens}, {rows}] was expected"
        )
    elif not positions.is_cuda and positions.numel():  # on a GPU this would make the host wait
        low, high = positions.aminmax()
        _check_range(int(low), int(high), table)


def _check_range(low: int, high: int, table: RopeTable) -> None:
    if low < 0 or high >= table.cos.size(0):
        raise ValueError(
            f"tokens reach position {low if low < 0 else high}, the table has {table.cos.shape[0]} positions"
        )


_Settings = tuple[RopeTable, int, int, bool, str]  # table, groups, width of a head, interleaved, back end


class _RotatePacked(torch.autograd.Function):
    """Rotates in place, in forward and in backward. It takes the flat projection, because autograd copies the gradient
    of a view that is changed in place."""

    @staticmethod
    def forward(ctx, qkv: Tensor, settings: _Settings, inverse: bool) -> Tensor:
        ctx.settings, ctx.inverse = settings, inverse
        ctx.mark_dirty(qkv)
        _rotate_packed(qkv, settings, inverse)
        return qkv

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # backward with create_graph=True
            copy = grad.clone(memory_format=torch.contiguous_format)
            return _RotatePacked.apply(copy, ctx.settings, not ctx.inverse), None, None
        grad = grad.contiguous()
        _rotate_packed(grad, ctx.settings, not ctx.inverse)
        return grad, None, None


def _rotate_packed(qkv: Tensor, settings: _Settings, inverse: bool) -> None:
    table, num_groups, head_dim, interleaved, backend = settings
    if backend == "torch":
        packed = qkv.unflatten(2, (num_groups, -1, head_dim))
        for part in (packed[..., :-2, : 2 * table.cos.size(1)], packed[..., -2:-1, : 2 * table.cos.size(1)]):
            part.copy_(ref.rotate_by(part.flatten(2, 3), table, interleaved, inverse).view(part.shape))
        return
    group = qkv.size(2) // (num_groups * head_dim)
    tensors = table.cos, table.sin, table.token_positions
    _turn_packed_(qkv, *tensors, table.offset, group, head_dim, interleaved, inverse)
    torch.autograd.graph.increment_version(qkv)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rope(q, k, cos, sin, positions, offset, *flags) -> tuple[Tensor, Tensor]:
    from llm_kernels.rope import kernel

    out = fresh(q), fresh(k)
    kernel.rotate(_dense(q), _dense(k), out, (cos, sin, positions, offset), flags)
    return out


def _rope_qkv_(qkv, cos, sin, positions, offset, group, head_dim, *flags) -> None:
    from llm_kernels.rope import kernel

    kernel.rotate_packed_(qkv, (cos, sin, positions, offset), group, head_dim, flags)


dispatch.define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, int offset, bool interleaved, bool inverse) "
    "-> (Tensor, Tensor)",
    _rope,
    lambda q, k, *_: (fresh(q), fresh(k)),
)
_turn_packed_ = dispatch.define(
    "rope_qkv_(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor? positions, int offset, int group, int head_dim, "
    "bool interleaved, bool inverse) -> ()",
    _rope_qkv_,
    lambda *_: None,
)


def _setup(ctx, inputs, output) -> None:
    _, _, cos, sin, positions, ctx.offset, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(ctx, dq: Tensor, dk: Tensor):
    return *_turn(dq, dk, *ctx.saved_tensors, ctx.offset, ctx.interleaved, not ctx.inverse), *(None,) * 6


_turn = dispatch.differentiable("rope", _setup, _gradients, linear=True)
