"""Sizes that follow from the parallel layout. Pure."""

from dapo_megatron.config import ActorConfig


def expert_tensor_parallel_size(actor: ActorConfig) -> int:
    """Ranks that share each expert's matrices (ETP): 1, but TP where the experts are not spread (EP 1).

    With EP 1 and any other ETP, megatron-core 0.16.1 leaves out the sum of the experts' gradients over TP.
    """
    return 1 if actor.expert_model_parallel_size > 1 else actor.tensor_model_parallel_size
