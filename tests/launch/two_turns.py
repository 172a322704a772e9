"""A user's own rollout: the model answers, is asked to check, and answers again; the question is not its own."""

import numpy as np

from dapo_megatron.records import Response, VersionSpan


async def rollout(prompt, engine):
    """Two turns; the tokens between them are masked."""
    first = await engine.generate(prompt.input_ids, max_new_tokens=4)
    check = engine.tokenizer("+0=", add_special_tokens=False)["input_ids"]
    so_far = np.concatenate([first.token_ids, check])
    second = await engine.generate([*prompt.input_ids, *so_far], max_new_tokens=4)
    token_ids = np.concatenate([so_far, second.token_ids])
    n, shift = len(token_ids), len(so_far)
    own = [True] * len(first.token_ids) + [False] * len(check) + [True] * len(second.token_ids)
    spans = first.version_spans + [VersionSpan(s.version, s.start + shift, s.end + shift) for s in second.version_spans]
    assert len(own) == n
    return Response(
        prompt_id=prompt.id,
        sample=engine.sample,
        token_ids=token_ids,
        loss_mask=own,
        rollout_logprobs=np.concatenate([first.logprobs, np.zeros(len(check)), second.logprobs]),
        version_spans=spans,
        finish_reason=second.finish_reason,
        text=engine.decode(second.token_ids),
        turns=2,
    )
