"""A plugin of SGLang 0.5.23 that gives its torch_native backend attention over many sequences at once.

SGLang finds it by the entry point in the folder beside this file, which is on the path of engines on CPU only. As it
is, the backend loops over the sequences of a batch (sglang/srt/layers/attention/torch_native_backend.py, "this is
inefficient"), in every layer of every step; with hundreds of short responses that is a third of a server's time. Here
sequences of about one length share one product.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
LONGEST = 1024
"""Tokens; where a batch has a longer sequence, a product of its own for each costs little."""
GATHERED = 1 << 24
"""Numbers of the key cache that are copied together for one product."""


def register() -> None:
    """Called by SGLang in each of its processes, before it serves."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(BACKEND + "._run_sdpa_forward_decode", decode, HookType.AROUND)
    HookRegistry.register(BACKEND + "._run_sdpa_forward_extend", extend, HookType.AROUND)


def decode(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Attention of one new token of each sequence; arguments are those of the method that it stands for."""
    _, *shared, seq_lens, encoder_lens = arguments
    if _unusual(seq_lens, encoder_lens, options):
        return original(*arguments, **options)
    return attend(*shared, seq_lens, torch.ones_like(seq_lens), options)  # type: ignore[call-arg]


def extend(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Causal attention of each sequence's new tokens; arguments are those of the method that it stands for."""
    _, *shared, seq_lens, _, new, encoder_lens = arguments
    if _unusual(seq_lens, encoder_lens, options) or not options["causal"]:
        return original(*arguments, **options)
    return attend(*shared, seq_lens, new, options)  # type: ignore[call-arg]


def _unusual(seq_lens: torch.Tensor, encoder_lens: torch.Tensor | None, options: dict[str, Any]) -> bool:
    other = encoder_lens is not None or options["is_cross_attn"] or options["sliding_window_size"] is not None
    return other or int(seq_lens.max()) > LONGEST


def attend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    new: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention of the last `new` tokens of each sequence to all tokens up to their own.

    Args:
        query, output: [sum(new), heads, head size], sequence after sequence.
        k_cache, v_cache: [slots, KV heads, head size].
        req_to_token: [requests, context] the slot of each token.
        pool_indices, seq_lens, new: [sequences] row of req_to_token, tokens so far with the new ones, new tokens.
    """
    seq_lens, new = seq_lens.long(), new.long()
    first = new.cumsum(0) - new
    for members in alike(seq_lens, new, k_cache[0].numel()):
        lens, count = seq_lens[members], new[members]
        columns, rows = torch.arange(int(lens.max())), torch.arange(int(count.max()))
        # What lies beyond a sequence is multiplied by zero: slot 0 is SGLang's own padding, and finite.
        slots = req_to_token[pool_indices[members], : len(columns)].masked_fill(columns >= lens[:, None], 0)
        seen = columns <= (lens - count)[:, None, None] + rows[:, None]
        real = rows < count[:, None]
        places = (first[members, None] + rows)[real]
        padded = query.new_zeros(*real.shape, *query.shape[1:])
        padded[real] = query[places]
        out = scaled_dot_product_attention(
            padded.transpose(1, 2),
            k_cache[slots].transpose(1, 2).to(query.dtype),
            v_cache[slots].transpose(1, 2).to(query.dtype),
            attn_mask=seen[:, None],
            scale=options["scaling"],
            enable_gqa=options["enable_gqa"],
        )
        output[places] = out.transpose(1, 2)[real]
    return output


def alike(seq_lens: torch.Tensor, new: torch.Tensor, row: int) -> Iterator[torch.Tensor]:
    """Members of each product: padding at most doubles a length, and a part's cache rows fit into GATHERED."""
    (_, digits), (_, new_digits) = torch.frexp(seq_lens.double()), torch.frexp(new.double())
    kind = 64 * digits + new_digits
    for wanted in kind.unique():
        members = (kind == wanted).nonzero()[:, 0]
        yield from members.split(max(1, GATHERED // (int(seq_lens[members].max()) * row)))
