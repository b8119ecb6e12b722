"""What training minimises. A new objective is one file and one row of OBJECTIVES.

An objective is an `nn.Module`, the one that DistributedDataParallel wraps, with

    build(model, heads, settings)   class method: of a `models.families.Backbone`, `heads.policy.PolicyHeads` or None,
                                    and a `training.objectives.settings.ObjectiveSettings`
    model, heads                    those, as sub-modules
    prepare(state, batch, labels, indices) -> what `forward` takes, with `num_targets`, the number of things that its
                                    loss is a mean over; without gradient, may sample. state: a
                                    `training.state.TrainState`, whose tokenizer makes tokens of images
    forward(prepared, num_targets) -> {"loss": the scalar to minimise, name: a scalar to log, …}; num_targets is the
                                    number of the whole step, over all processes and micro-batches
"""

from training.objectives.token import TokenObjective

OBJECTIVES = {"token": TokenObjective}
