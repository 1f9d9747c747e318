"""What a pruned checkpoint says of itself, held against its weights.

In: a checkpoint's skeleton. Out: nothing, or the linear whose zeros are others than its manifest says. One block is in
memory at a time.
"""

from __future__ import annotations

from owl_deploy.block_pruning import mask_sha256
from owl_deploy.errors import OwlDeployError
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.skeleton import Skeleton

__all__ = ["check_zeros"]


def check_zeros(skeleton: Skeleton, on_step: OnStep = silent) -> None:
    """Compare the zeros of every linear with the mask hash in owl.json; without one there is nothing to compare.

    Raises:
        OwlDeployError: they differ, so that figures of the pruning do not belong to these weights.
    """
    manifest = skeleton.checkpoint.manifest or {}
    expected = {fact["name"]: fact for fact in manifest.get("linears", []) if "mask_sha256" in fact}
    if not expected:
        return
    n_blocks = len(skeleton.blocks)
    for index in range(n_blocks):
        with skeleton.filled(index):
            for name, linear in skeleton.linears(index).items():
                kept = (linear.weight != 0).cpu()
                fact = expected.pop(name, None)
                if fact is not None and mask_sha256({name: kept}) != fact["mask_sha256"]:
                    raise OwlDeployError(
                        f"{skeleton.checkpoint.path}: the zeros of {name} are not those of its manifest "
                        f"({kept.numel() - int(kept.sum())} of {kept.numel()} weights, owl.json says "
                        f"{fact.get('n_zeros')}): the weights were changed after pruning, so remove owl.json or prune "
                        "again"
                    )
        on_step(Step("checking the zeros", index + 1, n_blocks, f"block {index}"))
    if expected:
        raise OwlDeployError(
            f"{skeleton.checkpoint.path}: owl.json speaks of {next(iter(expected))}, which the model does not have"
        )
