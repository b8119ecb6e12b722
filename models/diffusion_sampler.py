"""The sampler of the diffusion loss: from noise to tokens, guided in some rows, as one capture on a GPU.

Legend: N token rows, G of them guided, C channels of a token, D width of z, W width of the MLP, T diffusion steps.
"""

from typing import NamedTuple

import torch

from diffusion.schedule import NUM_TRAIN_STEPS, cosine_schedule
from diffusion.solvers import SOLVERS
from models.token_head import push
from util.dist import send
from util.graphs import bucket
from util.rng import draw_by_image


class Drawing(NamedTuple):
    """What a draw computes with; where guidance acts on no row, all from free on is left out.

    z (N, D); tau (N, 1) or a float; noise (T + 1, N, C). free (G, D): z without label of the rows that guidance acts
    on. w (N, 1) or a float. shares: m of a profile at each of the T steps, each (N, 1) or a float; None: 1. guided
    (G,) long: the rows that free is of, place (N,) long: of each row the one in free, −1 for none; both None: of all.
    """

    z: torch.Tensor
    tau: torch.Tensor | float
    noise: torch.Tensor
    free: torch.Tensor | None = None
    w: torch.Tensor | float = 1.0
    shares: list | torch.Tensor | None = None
    guided: torch.Tensor | None = None
    place: torch.Tensor | None = None


class DiffusionSampler:
    """The reverse process of a `models.diffloss.DiffLoss`, head: a `models.token_head.Sampler`."""

    def __init__(self, head, num_steps: tuple[int, int], solver: str, spacing: str | None, clip):
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; valid: {', '.join(SOLVERS)}")
        self.head, self.num_steps, self.clip = head, num_steps, clip
        self.solver, self.spacing = SOLVERS[solver], spacing or SOLVERS[solver].spacing
        cosine_schedule(num_steps[0], self.spacing)  # an unknown spacing is an error now, not at the first step

    def evals(self, num_steps: int, tokens: int, guided: int, profile=None) -> int:
        """A row for each token at each diffusion step, two where guidance acts on it."""
        schedule = cosine_schedule(num_steps, self.spacing)
        acting = sum(_acts(_share(profile, schedule, i)) for i in range(num_steps)) if guided else 0
        return tokens * num_steps + guided * acting

    def noise(self, generators, rows, num_steps: int) -> torch.Tensor:
        """(T + 1, N, C), the part of each image from its own generator."""
        return draw_by_image(generators, rows, lambda k: (num_steps + 1, k, self.head.channels), dim=1)

    def draw(self, z, z_uncond, cfg, tau, noise, num_steps: int, guided=None, profile=None) -> torch.Tensor:
        """Tokens (N, C), float32, differentiable in z, cfg, tau and the weights.

        z, z_uncond (N, D): with z_uncond ε is the guided one, the variance the conditional one; N trajectories are
        carried and the net sees 2N rows. cfg, tau: float or (N,); what tau does is the solver's, see
        `diffusion.solvers`. noise (num_steps + 1, N, C). guided (G,) long: the rows that guidance acts on, those of
        z_uncond (G, D), where it is not on all; the net sees N + G rows then. profile: see `models.token_head.Sampler`;
        where it gives the float 0 the net sees N rows. A wrong shape, or guidance without z_uncond, raises ValueError.
        On a GPU, without gradient, it is a replay of a capture (`util.graphs`), whose rows are padded.
        """
        self._check(z, z_uncond, cfg, tau, noise, num_steps)
        schedule = cosine_schedule(num_steps, self.spacing)
        drawing, acts = Drawing(z, column(tau), noise.float()), ()
        if z_uncond is not None and not (isinstance(cfg, int | float) and cfg == 1.0):
            shares = None if profile is None else _shares(profile, schedule, len(z))
            acts = tuple(shares is None or _acts(shares[i]) for i in range(num_steps))
            place = None if guided is None else _places(guided, len(z))
            drawing = drawing._replace(free=z_uncond, w=column(cfg), shares=shares, guided=guided, place=place)
        if self.head.graphs.usable(self.head, z.device):
            return self._replayed(schedule, acts, drawing)
        return self._computed(schedule, acts, drawing)

    def _computed(self, schedule, acts: tuple, d: Drawing) -> torch.Tensor:
        """Tokens (N, C) float32; acts: at which of the T steps guidance does, () for none."""
        net, num_rows = self.head.net, len(d.z)
        times = net.time_embed(schedule.table("timesteps", d.z.device))  # (T, W)
        condition = net.condition(d.z if d.free is None else torch.cat([d.z, d.free]))  # (N + G, W)
        unguided = condition if all(acts) else net.condition(d.z)  # (N, W), where a step needs it
        if d.place is not None:
            acting, place = (d.place >= 0).unsqueeze(1), d.place.clamp(min=0)
        excess = _excess(d, len(schedule))

        def predict(x, i):
            time = times[i : i + 1]
            if not acts or not acts[i]:
                return net(x, time, unguided).float().chunk(2, dim=-1)
            both = torch.cat([x, x if d.guided is None else x[d.guided]])
            eps, v = net(both, time, condition).float().chunk(2, dim=-1)
            eps, eps_u, v = eps[:num_rows], eps[num_rows:], v[:num_rows]
            if d.place is None:
                return push(eps, eps_u, excess[i]), v
            return torch.where(acting, push(eps, eps_u[place], excess[i]), eps), v

        return self.solver.run(predict, schedule, d.noise, d.tau, self.clip)

    def _replayed(self, schedule, acts: tuple, d: Drawing) -> torch.Tensor:
        """The same, of a capture for buffers of a few sizes."""
        num_rows, device = len(d.z), d.z.device
        d = d._replace(tau=_spread(d.tau, num_rows, device))
        if acts:
            d = d._replace(w=_spread(d.w, num_rows, device))
        if d.shares is not None:
            d = d._replace(shares=_spread_all(d.shares, num_rows, device))
        names = [name for name, value in zip(d._fields, d) if isinstance(value, torch.Tensor)]
        tensors, shapes = [getattr(d, name) for name in names], []
        for name, x in zip(names, tensors):
            axis = 1 if name in ("noise", "shares") else 0
            shapes.append((*x.shape[:axis], bucket(x.shape[axis]), *x.shape[axis + 1 :]))

        def function(*buffers):
            return self._computed(schedule, acts, Drawing(**dict(zip(names, buffers))))

        key = (schedule, self.solver, self.clip and tuple(self.clip), acts, *names)
        return self.head.graphs.run(key, function, tensors, shapes)[:num_rows]

    def _check(self, z, z_uncond, cfg, tau, noise, num_steps):
        shape = (num_steps + 1, len(z), self.head.channels)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must have shape {shape} (num_steps + 1, N, C), got {tuple(noise.shape)}")
        for name, value in (("cfg", cfg), ("tau", tau)):
            _check_rows(name, value, len(z))
        if z_uncond is None and not torch.all(torch.as_tensor(cfg) == 1.0):
            raise ValueError(f"cfg {cfg} needs z_uncond; without it only cfg 1.0 is valid")


def _excess(d: Drawing, num_steps: int):
    """w' − 1 = (w − 1)·m at each of the T steps, each (N, 1) or a float."""
    excess = d.w - 1.0
    if d.shares is None:
        return [excess] * num_steps
    return excess * d.shares if isinstance(d.shares, torch.Tensor) else [excess * m for m in d.shares]


def _share(profile, schedule, i: int):
    """m of a profile at diffusion step i of a schedule, 1.0 without one; the timestep is read on the host."""
    return 1.0 if profile is None else profile(float(schedule.timesteps[i]) / NUM_TRAIN_STEPS)


def _shares(profile, schedule, num_rows: int) -> list:
    """m at each of the T steps, a float or (N, 1); the profile is asked in the order of the draw, from T − 1 to 0."""
    shares = [_share(profile, schedule, i) for i in reversed(range(len(schedule)))][::-1]
    for m in shares:
        _check_rows("profile", m, num_rows)
    return [column(m) for m in shares]


def _places(guided, num_rows: int) -> torch.Tensor:
    """(N,) long: where in guided (G,) each of N rows stands, −1 for nowhere."""
    nowhere = torch.full((num_rows,), -1, device=guided.device)
    return nowhere.index_copy(0, guided, torch.arange(len(guided), device=guided.device))


def _check_rows(name: str, value, num_rows: int) -> None:
    """Raise ValueError unless a value is a number or has one for each row."""
    if isinstance(value, torch.Tensor) and value.dim() and value.numel() != num_rows:
        raise ValueError(f"{name} must be a number or one for each of the {num_rows} rows, got {value.numel()}")


def _acts(m) -> bool:
    """Is guidance computed at this m? A tensor is not read: that would wait for the device."""
    return isinstance(m, torch.Tensor) or m != 0.0


def column(value):
    """A float as it is, (N,) or (N, 1) as (N, 1) float32, so that it broadcasts over channels."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.float().reshape(-1, 1) if value.dim() else value.float()


def _spread_all(shares: list, num_rows: int, device) -> torch.Tensor:
    """Floats or tensors () or (N, 1) of T steps as (T, N, 1) float32 on the device; floats are sent together."""
    if not any(isinstance(m, torch.Tensor) for m in shares):
        return send(torch.tensor(shares, dtype=torch.float32), device).view(-1, 1, 1).expand(-1, num_rows, 1)
    return torch.stack([_spread(m, num_rows, device) for m in shares])


def _spread(value, num_rows: int, device) -> torch.Tensor:
    """A float or a tensor () or (N, 1) as (N, 1) float32 on the device."""
    if not isinstance(value, torch.Tensor):
        return torch.full((num_rows, 1), value, dtype=torch.float32, device=device)
    return send(value, device).expand(num_rows, 1)  # a tensor () may be on the host
