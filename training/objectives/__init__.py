"""What training minimises. A new objective is one file and one row of OBJECTIVES.

An objective is an `nn.Module` with

    prepare(state, batch, labels, indices) -> what `forward` takes, with `num_targets`; without gradient, may sample
    forward(prepared, num_targets) -> {"loss": the scalar to minimise, name: what is logged beside it, …}
"""

from training.objectives.token import TokenObjective

OBJECTIVES = {"token": TokenObjective}
