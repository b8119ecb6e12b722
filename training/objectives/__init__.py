"""What training minimises. A new objective is one file and one row of OBJECTIVES.

An objective is an `nn.Module`, the one that DistributedDataParallel wraps, with

    build(model, heads, settings)   class method: of a `models.families.Backbone`, `heads.policy.PolicyHeads` or None,
                                    and a `training.objectives.settings.ObjectiveSettings`
    model, heads                    those, as sub-modules
    prepare(state, batch, labels, indices) -> what `forward` takes, with `num_targets`, the number of things that its
                                    loss is a mean over; without gradient, may sample. state: a
                                    `training.state.TrainState`, whose tokenizer makes tokens of images
    foresee(state, step, batch, indices)  begins, in the thread of state.ahead, with what `prepare` will need of the
                                    images of a later step; or does nothing
    forward(prepared, num_targets) -> {"loss": the scalar to minimise, name: a scalar to log, …}; num_targets is the
                                    number of the whole step, over all processes and micro-batches
    form                            class attribute: the row of `heads.forms.FORMS` that its heads are of
    keeps_model                     class attribute: does it train heads alone, and sample while it does?
    unused                          class attribute: names of the flags that it does not read
    defaults(chosen) -> settings of its own, where the flags give none; static, of the dict of all settings
    check(heads, settings)          static; ValueError for settings that contradict each other
    optimizer() -> what makes the steps; "lr_share" of a parameter group, if any, multiplies the learning rate
    average_heads() -> the average of the heads that is kept, a `training.optim.EMA`
    memory() -> what a checkpoint keeps of it beside weights, a dict of plain values and tensors;
    remember(memory)                goes on from there, {} being none
"""

from training.objectives.image import ImageObjective
from training.objectives.token import TokenObjective

OBJECTIVES = {"token": TokenObjective, "image": ImageObjective}
