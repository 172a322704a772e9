"""Two small bin problems, solved greedily and deterministically: equal shards, and bins under a budget.

Both work on lengths in tokens and return indices into them.
"""

import bisect
import heapq
from collections.abc import Sequence


def balance(lengths: Sequence[int], shards: int) -> list[list[int]]:
    """Spread items over `shards` to nearly equal sums: longest first, each to the lightest shard.

    The heaviest shard exceeds the mean by less than the longest item, and the optimum by at most a third
    (Graham 1969, "Bounds on multiprocessing timing anomalies"). Ties go to the earlier item and the lower
    shard.

    Returns:
        [shards] lists of indices, longest item first; empty lists where there are fewer items than shards.
    """
    parts: list[list[int]] = [[] for _ in range(shards)]
    lightest = [(0, shard) for shard in range(shards)]
    for item in _longest_first(lengths):
        load, shard = heapq.heappop(lightest)
        parts[shard].append(item)
        heapq.heappush(lightest, (load + lengths[item], shard))
    return parts


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items into bins of at most `budget` tokens: longest first, each into the fullest bin it fits in.

    An item longer than the budget stands alone. No two bins could be merged within the budget.

    Returns:
        Lists of indices, none of them empty; the bin with the longest item comes first, so that a budget too
        large for the device's memory shows at once.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), least room first
    for item in _longest_first(lengths):
        fit = bisect.bisect_left(rooms, (lengths[item], 0))
        if fit < len(rooms):
            room, best = rooms.pop(fit)
        else:
            room, best = budget, len(bins)
            bins.append([])
        bins[best].append(item)
        bisect.insort(rooms, (room - lengths[item], best))
    return bins


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda item: -lengths[item])
