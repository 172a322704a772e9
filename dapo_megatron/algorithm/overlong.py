"""Soft overlong punishment (DAPO, arXiv 2503.14476, section 3.4, equation 13)."""


def overlong_penalty(response_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """R_len of one response, in [-1.0, 0.0].

        0                                    n <= L_max - L_cache
        ((L_max - L_cache) - n) / L_cache    L_max - L_cache < n <= L_max
        -1                                   L_max < n

    Args:
        response_tokens: n, generated tokens (the prompt is not counted).
        max_tokens: L_max, tokens; the length at which the punishment is full.
        cache_tokens: L_cache, tokens; the width of the slope below L_max. 0: no slope, and 0 up to L_max.

    Raises:
        ValueError: unless 0 <= cache_tokens <= max_tokens.
    """
    if not 0 <= cache_tokens <= max_tokens:
        raise ValueError(f"overlong penalty needs 0 <= cache_tokens <= max_tokens, got {cache_tokens} and {max_tokens}")
    over_soft_limit = response_tokens - (max_tokens - cache_tokens)
    if over_soft_limit <= 0:
        return 0.0
    if over_soft_limit >= cache_tokens:
        return -1.0
    return -over_soft_limit / cache_tokens
