"""What a checkpoint of a run holds, and how a run continues from one. The file itself: util/checkpoint.py."""

from dataclasses import asdict
from pathlib import Path

import torch

from models.families import FAMILIES, family_of
from models.loading import check_config
from sampling.settings import SampleConfig
from training.config import DataConfig, LaunchConfig, TokenizerConfig
from training.optim import make_optimizer
from training.state import TrainState
from util import dist
from util.checkpoint import checkpoint_path, load_checkpoint, load_weights
from util.evaluation.protocol import EvalConfig
from util.foreign import some_weights, type_of
from util.images.reading import MARS_WAY

# settings that say where and how a run runs, not what it computes
PLACES = {"resume", "init_from", "output_dir", "log_dir", "allow_mismatch", "device", "num_workers", "pin_mem"}
PLACES |= {"world_size", "local_rank", "dist_url", "dist_on_itp", "keep_last", "preset", "class_num", "deterministic"}
PLACES |= {"keep_classes"}
# what these must be to be continued; a checkpoint of another program may lack them
_STATE = {"optimizer": dict, "scaler": dict, "rng": dict, "epoch": int, "step": int}


def stored_config(
    state: TrainState,
    family: str,
    *,
    tokenizer: TokenizerConfig,
    data: DataConfig,
    sampling: SampleConfig,
    evaluation: EvalConfig,
) -> dict:
    """`config` of a run's checkpoints, but for the names of the classes; the keys: util/checkpoint.py."""
    return {
        "family": family,
        family: asdict(state.model.config),
        **asdict(tokenizer),
        "latents": state.tokenizer.describe(),
        "heads": state.heads.settings() if state.heads is not None else None,
        "data": {"name": data.data, "path": data.data_path, "reading": asdict(data.reading)},
        "sample": asdict(sampling),
        "eval": asdict(evaluation),
    }


def checkpoint_content(state: TrainState, epoch: int, classes: list[str]) -> dict:
    """What a checkpoint holds, `epoch` being the last finished one; the keys: util/checkpoint.py."""
    config = state.stored["config"]
    return {
        "model": state.model.state_dict(),
        "model_ema": state.ema.weights,
        "optimizer": state.optimizer.state_dict(),
        "epoch": epoch,
        "scaler": state.scaler.state_dict(),
        "args": state.stored["args"],
        "heads": state.heads.state_dict() if state.heads is not None else {},
        "heads_ema": state.heads_ema.weights if state.heads is not None else {},
        **({"objective": memory} if (memory := state.objective.memory()) else {}),
        "config": {**config, "data": {**config["data"], "classes": classes}},
        # every draw is a function of seed, step and sample; batch: how far into the unfinished epoch of so many steps
        "rng": {
            "seed": state.seed,
            "step": state.step,
            "batch": state.batch,
            "steps_per_epoch": state.steps_per_epoch,
        },
        "step": state.step,
    }


def find_checkpoint(launch: LaunchConfig) -> tuple[dict | None, bool]:
    """(content, is it this run's own?) of the checkpoint in --resume, else in --init_from; None for a fresh start."""
    source = launch.resume
    if source and (launch.evaluate or checkpoint_path(source).is_file()):
        return _open(source), True
    first = launch.init_from
    if source and dist.is_main():
        print(f"no checkpoint in {source} yet: starting {f'from {first}' if first else 'fresh'}")
    return (_open(first) if first else None), False


def _open(source) -> dict:
    """The content of a checkpoint, its config checked."""
    content = load_checkpoint(source)
    if "config" in content:
        check_config(content["config"], source)
    return content


def check_output(launch: LaunchConfig) -> None:
    """Raise ValueError where training would replace checkpoints that are not those it continues from."""
    folder, source = Path(launch.output_dir), checkpoint_path(launch.resume or "no run")
    stored = sorted(folder.glob("checkpoint-*.pth"))
    if stored and not (source.is_file() and source.parent.resolve() == folder.resolve()):
        raise ValueError(
            f"--output_dir {folder} has checkpoints of another run ({stored[0].name}): continue that with "
            f"--resume {folder}, or choose another folder"
        )


def check_resume(launch: LaunchConfig, stored: dict, content: dict, classes: list[str]) -> None:
    """Say which settings are not those of the checkpoint content that --resume continues.

    stored: {args, config} of this run. Where sizes of the model, tokenizer or classes are others ValueError, unless
    --allow_mismatch is given. (Sizes that change the shape of a weight are refused in any case, when the weights are
    loaded.)
    """
    now, before, args = stored["config"], content.get("config", {}), content.get("args")
    sizes, old_sizes = now[now["family"]], before.get(family_of(before), {})
    free = FAMILIES[now["family"]].config.FREE
    changed = [name for name in sizes.keys() & old_sizes.keys() - free if old_sizes[name] != sizes[name]]
    wrong = sorted(f"{name} {old_sizes[name]}, not {sizes[name]}" for name in changed)
    if before.get("latents") not in (None, now["latents"]):
        wrong.append(f"latents of {before['latents']}, not {now['latents']}")
    if now.get("text") and now["text"]["fingerprint"] != before.get("text", now["text"])["fingerprint"]:
        wrong.append("features of captions by another encoder")
    old_classes = before.get("data", {}).get("classes", classes)
    if old_classes != classes:
        first = next(((a, b) for a, b in zip(old_classes, classes) if a != b), ("another number", "of them"))
        wrong.append(f"other classes, the first is {first[0]!r}, not {first[1]!r}")
    if wrong and not launch.allow_mismatch:
        raise ValueError(
            f"{launch.resume} was trained on {'; '.join(wrong)}: --init_from starts a new run from its weights, "
            "--allow_mismatch continues it all the same"
        )
    if isinstance(args, dict) and not launch.evaluate and dist.is_main():
        settings = stored["args"]
        if settings.get("data") == "imagefolder":  # older checkpoints do not say how images were read
            args = {**asdict(MARS_WAY), **args}
        names = [k for k in settings if k in args and k not in PLACES and args[k] != settings[k]]
        if names:
            print("changed since the checkpoint: " + ", ".join(f"--{k} {args[k]} -> {settings[k]}" for k in names))


def fit_classes(state: TrainState, content: dict, launch: LaunchConfig, classes: list[str]) -> dict:
    """The content of --init_from for a model of these classes; prints what becomes of its own classes.

    With another number of classes, or --keep_classes, each parameter with a row for each class is the state's, fresh;
    --keep_classes puts the checkpoint's rows of classes with the same names into it.
    """
    weights = some_weights(content)
    names = [name for name in state.model.per_class if name in weights and weights[name].dim()]
    # a table may have a row for no class after those of the classes
    num_others = len(state.ema.weights[names[0]]) - len(classes) if names else 0
    num_stored = len(weights[names[0]]) - num_others if names else len(classes)
    if not names or (num_stored == len(classes) and not launch.keep_classes):
        return content  # a weight that is missing is named when they are loaded
    rows = []  # (of this run, of the checkpoint)
    if launch.keep_classes:
        stored = content.get("config", {}).get("data", {}).get("classes")
        if stored is None:
            raise ValueError(f"--keep_classes: {launch.init_from} has no names of classes to compare with")
        rows = [(i, stored.index(name)) for i, name in enumerate(classes) if name in stored[:num_stored]]
    if len(rows) < len(classes) and not any(p.requires_grad for n, p in state.model.named_parameters() if n in names):
        raise ValueError(
            f"--freeze_backbone would leave {len(classes) - len(rows)} of the {len(classes)} classes as they start, "
            f"which {launch.init_from} does not have"
        )
    content, others = dict(content), []
    if rows:
        others = [(len(classes) + i, num_stored + i) for i in range(num_others)]
    for key in ("model", "model_ema"):
        if content.get(key):
            content[key] = _with_rows(content[key], state.ema.weights, names, rows + others)
    if dist.is_main():
        start = f"{launch.init_from} has {num_stored} classes, the data {len(classes)}:"
        kept = f"{len(rows)} of the same name are kept, {len(classes) - len(rows)} start anew"
        print(f"{start} {kept if launch.keep_classes else 'the class embedding starts anew'}")
    return content


def _with_rows(weights: dict, fresh: dict, names, rows: list[tuple[int, int]]) -> dict:
    """The weights with these rows, (new place, place), of the named ones put into fresh ones."""
    result = dict(weights)
    new, old = ([row[i] for row in rows] for i in (0, 1))
    for name in names:
        old_rows = weights.get(name, torch.zeros(()))
        # one that does not fit is left as it is: load_weights names it
        if old_rows.dim() and old_rows.shape[1:] == fresh[name].shape[1:] and len(old_rows) > max(old, default=0):
            result[name] = fresh[name].cpu().clone()
            result[name][new] = old_rows[old].float()
    return result


def restore_weights(state: TrainState, content: dict, source, heads_too: bool = True) -> None:
    """Load the weights and their averages of a checkpoint.

    heads_too: it must have the heads that are trained here, those and no others; else those of them that it has are
    taken over, if their form is the same, and the others start at zero.
    """
    load_weights(state.model, some_weights(content), source)
    state.ema.load(content.get("model_ema") or content["model"])
    wanted = state.heads.learn if state.heads is not None else ()
    stored = content.get("config", {}).get("heads") or {}
    trained = stored.get("learn", [])
    if heads_too and list(wanted) != trained:
        raise ValueError(
            f"{source} has the heads {','.join(trained) or 'none'}, --learn names {','.join(wanted) or 'none'}; "
            "a new stage with other heads starts with --init_from"
        )
    same_form = state.heads is not None and stored.get("form", "bounded") == state.heads.form
    if taken := [name for name in wanted if name in trained and (heads_too or same_form)]:
        take_heads(state, content, taken, source)
    if dist.is_main() and not heads_too and trained and wanted:
        fresh = [name for name in wanted if name not in taken]
        print(f"heads of {source}: {','.join(taken) or 'none'}; that start at zero: {','.join(fresh) or 'none'}")


def take_heads(state: TrainState, content: dict, names: list[str], source) -> None:
    """Load the heads of these names and their averages from a checkpoint."""
    weights, averaged = content.get("heads"), content.get("heads_ema")
    if not weights and not averaged:
        raise ValueError(f"{source} is damaged: its config names heads, and it has none")
    prefixes = tuple(f"heads.{name}." for name in names)

    def with_fresh(stored: dict) -> dict:
        """The stored weights of these heads, and those that the others start with."""
        own = {key: value for key, value in state.heads.state_dict().items() if not key.startswith(prefixes)}
        return own | {key: value for key, value in stored.items() if key.startswith(prefixes)}

    load_weights(state.heads, with_fresh(weights or averaged), source)
    state.heads_ema.load(with_fresh(averaged or weights))


def averages_as_weights(content: dict) -> dict:
    """The content of a checkpoint with the averaged weights, those that are sampled with, as the weights too."""
    pairs = (("model", "model_ema"), ("heads", "heads_ema"))
    return content | {name: content[average] for name, average in pairs if content.get(average)}


def regrouped(stored: dict, state: TrainState) -> dict:
    """The content of an optimizer, for the groups that the parameters stand in now.

    Until 30 November 2026 the output layer of models of ids had no weight decay, as MAR's token head; it then stood in
    the other group. What fits neither is given back as it is.
    """
    now, sizes = state.optimizer.param_groups, [len(group["params"]) for group in stored["param_groups"]]
    if getattr(state.model, "no_decay", None) != () or sizes == [len(group["params"]) for group in now]:
        return stored
    before = make_optimizer(state.objective, state.model.token_head, 0.0, 0.0).param_groups
    if sizes != [len(group["params"]) for group in before]:
        return stored
    place = {id(p): number for number, p in enumerate(p for group in before for p in group["params"])}
    old = [place[id(p)] for group in now for p in group["params"]]
    moments = {new: stored["state"][number] for new, number in enumerate(old) if number in stored["state"]}
    groups, first = [], 0
    for group, own in zip(stored["param_groups"], now):
        groups.append(group | {"params": [*range(first, first + len(own["params"]))]})
        first += len(own["params"])
    return {"state": moments, "param_groups": groups}


def restore(state: TrainState, content: dict, source) -> int:
    """Load a checkpoint into the state; the epoch to continue with."""
    for key, value_type in _STATE.items():
        if not isinstance(content.get(key, value_type()), value_type):
            reason = f"its {key!r} is {type_of(content[key])}"
            raise ValueError(f"{source} cannot be continued, {reason}; --init_from starts a new run from its weights")
    for key, least in (("epoch", -1), ("step", 0)):  # -1: not even the first epoch is whole
        if content.get(key, least) < least:
            raise ValueError(f"{source} is damaged: its {key} is {content[key]}; valid: {least} and more")
    restore_weights(state, content, source)
    state.objective.remember(content.get("objective", {}))
    if "optimizer" in content:
        kinds = ("weight_decay", "betas", "lr_share", "fused", "foreach")
        flags = [{key: group[key] for key in kinds if key in group} for group in state.optimizer.param_groups]
        try:
            stored = content["optimizer"]
            # before it is loaded, since what is fused has its count of steps on the device
            stored = regrouped(stored, state)
            if len(stored["param_groups"]) == len(flags):  # the flags count, as they do for lr
                stored = stored | {"param_groups": [a | b for a, b in zip(stored["param_groups"], flags)]}
            state.optimizer.load_state_dict(stored)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"the optimizer in {source} does not fit this run ({reason}); see --init_from") from None
    if content.get("scaler") and state.scaler.is_enabled():
        state.scaler.load_state_dict(content["scaler"])
    epoch = content.get("epoch", -1) + 1
    state.step = content.get("step", epoch * state.steps_per_epoch)
    place = content.get("rng", {})
    if place.get("batch") and place["steps_per_epoch"] == state.steps_per_epoch:
        state.batch = place["batch"]
    elif place.get("batch") and dist.is_main():
        print(f"another batch size than before: epoch {epoch + 1} starts from its beginning")
    return epoch
