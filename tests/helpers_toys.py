"""Two toy families for the sampling loop: causal with a key-value store, and next-scale; and a token head for both.

A token is a number; z of a position is a sum of what is known, so that any token drawn too early, twice, or from stale
keys shows. `naive` samples each without the loop, without a store, one token at a time.
"""

from types import SimpleNamespace

import torch
from torch import nn

from models.token_head import check_no_profile, guide
from util.rng import draw_by_image

WIDTH = 3


class ToyHead:
    """token = tanh of the guided z's sum + 0.1·τ·noise."""

    has_steps, discrete = False, False

    def empty(self, batch, length):
        return torch.zeros(batch, length, 1)

    def sampler(self, *, num_steps=1, solver="ddpm", spacing=None, top_k=0, top_p=1.0):
        return SimpleNamespace(num_steps=(1, 1), evals=self.evals, noise=self.noise, draw=self.draw)

    def evals(self, num_steps, tokens, guided, profile=None):
        return tokens + guided

    def noise(self, generators, rows, num_steps):
        return draw_by_image(generators, rows, lambda k: (k, 1), dim=0)

    def draw(self, z, z_uncond, cfg, tau, noise, num_steps, guided=None, profile=None):
        check_no_profile(profile)
        if z_uncond is not None:
            guided = torch.arange(len(z)) if guided is None else guided
            w = cfg[guided].unsqueeze(1)
            z = z.index_copy(0, guided, guide(z[guided], z_uncond, w))
        return torch.tanh(z.sum(dim=1, keepdim=True)) + 0.1 * torch.as_tensor(tau).reshape(-1, 1) * noise


class Toy(nn.Module):
    """What both families share: a weight for each (label or none, position, position), and no latents but tokens."""

    fixed_rules, per_class, width, head_dim = {}, (), WIDTH, WIDTH

    def __init__(self, length):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, length, length, WIDTH, generator=g) / length**0.5)  # label 3: none
        self.bias = nn.Parameter(torch.randn(4, length, WIDTH, generator=g))
        self.config, self.token_head = SimpleNamespace(seq_len=length, class_num=3), ToyHead()

    def unpatchify(self, tokens):
        return tokens

    def z(self, label, position, keys):
        """z (D,) of a position from the (position, token (1,)) it may look at."""
        return self.bias[label, position] + sum(self.weight[label, position, p] * token for p, token in keys)


class Causal(Toy):
    """One token after the other, in the image's random order; each sees those before it in this order."""

    def conditions(self, labels, *, orders, tokenizer=None, refresh_every=1, recompute=False):
        return CausalConditions(self, labels, orders)


class CausalConditions:
    """The store with label is what was given and what write() was told, the one without has holes where w was 1.

    The holes, and tokens that were given, are filled when the store is next used.
    """

    def __init__(self, model, labels, orders):
        self.model, self.orders, self.passes, self.labels = model, orders, 0.0, [label % 4 for label in labels.tolist()]
        self.keys = [[{} for _ in labels] for _ in range(2)]  # with label and without: of each image {position: token}

    def look(self, step, tokens, unknown, images):
        if step == 0:
            self.fill(0, images.tolist(), tokens, unknown)
        positions = torch.stack([next(p for p in self.orders[i] if unknown[i, p]) for i in images.tolist()])
        z = [self.z(0, i, p) for i, p in zip(images.tolist(), positions.tolist())]
        return torch.stack(z).unsqueeze(1), positions.unsqueeze(1)

    def at(self, step, tokens, unknown, rows, guided):
        self.fill(1, rows[guided, 0].tolist(), tokens, unknown)
        z, free = ([self.z(half, i, p) for i, p in some.tolist()] for half, some in ((0, rows), (1, rows[guided])))
        return torch.stack(z), torch.stack(free) if free else None

    def fill(self, half, images, tokens, unknown):
        for i in images:
            for p in (~unknown[i]).nonzero().flatten().tolist():
                self.keys[half][i].setdefault(p, tokens[i, p])

    def z(self, half, i, position):
        return self.model.z(3 if half else self.labels[i], position, self.keys[half][i].items())

    def write(self, step, rows, drawn):
        for (i, p), token in zip(rows.tolist(), drawn):
            self.keys[0][i][p] = token


SCALES = torch.tensor([0, *[1] * 4, *[2] * 9])  # of 14 positions: groups of 1, 4, 9


class NextScale(Toy):
    """A scale is drawn whole; each of its tokens sees those of the scales before it."""

    def conditions(self, labels, *, orders=None, tokenizer=None, refresh_every=1, recompute=False):
        return ScaleConditions(self, labels)


class ScaleConditions:
    def __init__(self, model, labels):
        self.model, self.passes, self.labels = model, 0.0, [label % 4 for label in labels.tolist()]

    def look(self, step, tokens, unknown, images):
        positions = (SCALES == step).nonzero().squeeze(1)
        z = [torch.stack([self.one(self.labels[i], i, p, tokens) for p in positions.tolist()]) for i in images.tolist()]
        return torch.stack(z), positions.expand(len(images), -1)

    def at(self, step, tokens, unknown, rows, guided):
        z = [self.one(self.labels[i], i, p, tokens) for i, p in rows.tolist()]
        free = [self.one(3, i, p, tokens) for i, p in rows[guided].tolist()]
        return torch.stack(z), torch.stack(free) if free else None

    def one(self, label, i, position, tokens):
        return self.model.z(label, position, before(position, tokens[i]))

    def write(self, step, rows, drawn):
        pass


def before(position, tokens):
    """(position, token) of the scales before this position's."""
    return [(p, tokens[p]) for p in range(len(SCALES)) if SCALES[p] < SCALES[position]]
