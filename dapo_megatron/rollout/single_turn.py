"""The default rollout: one question, one answer."""

import numpy as np

from dapo_megatron.records import Prompt, Response
from dapo_megatron.rollout.engine import Engine


async def rollout(prompt: Prompt, engine: Engine) -> Response:
    """Sample one response; every token is the policy's own and is trained, the stop token included."""
    completion = await engine.generate(prompt.input_ids)
    return Response(
        prompt_id=prompt.id,
        sample=engine.sample,
        token_ids=completion.token_ids,
        loss_mask=np.ones(len(completion.token_ids), np.bool_),
        rollout_logprobs=completion.logprobs,
        version_spans=completion.version_spans,
        finish_reason=completion.finish_reason,
        text=engine.decode(completion.token_ids),
    )
