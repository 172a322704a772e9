"""Seeds of single responses: pure functions of what is sampled, never of when or in which process."""

import hashlib


def sampling_seed(*parts: int | str) -> int:
    """A seed of 31 bits for what `parts` name: the run's seed, a purpose, prompt, sample, turn."""
    # Lengths go before the parts, so that no two lists of parts read alike.
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big") >> 1
