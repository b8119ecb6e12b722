"""What sampling needs of a next-scale model: z of a scale's tokens from the scales before it, and the sum that grows.

Legend: B images, R of them looked at, S scales of p_s × p_s tokens, L = Σ p_s² tokens of an image, F of them in the
first scale, D width of z, N drawn tokens, G of them guided, C channels of a code, f̂ (B, C, h, w) the sum of what the
scales so far stand for.
"""

import torch
from torch.nn import functional as F

from models.kv_cache import Extension, StaticCaches, two_caches
from util.dist import send


class StaticScales(StaticCaches):
    """Such caches, and the modulations of the halves, which stay in one place too."""

    def __init__(self, *kind):
        super().__init__(*kind)
        self.modulations = [None, None]

    def place(self, half: int, modulations: list) -> list:
        """These modulations, in the place of those that the half had before."""
        if self.modulations[half] is None:
            self.modulations[half] = [vectors.clone() for vectors in modulations]
        else:
            torch._foreach_copy_(self.modulations[half], modulations)
        return self.modulations[half]


def pass_of_scale(model, modulations: list, extension: Extension):
    """z (B, p², D) of a scale as a function of the inputs and, with label, the labels; nothing else changes."""
    return lambda inputs, labels=None: model.extend(labels, inputs, modulations, extension)


class NextScaleConditions:
    """The `models.families.Conditions` of a next-scale model: step s is scale s, drawn whole.

    Keys and values of all scales so far are kept, with label and, in a cache of their own, without. That one lags
    behind where w was 1, and catches up in one pass at the next guided step. Tokens that are given are read from the
    tokens like those that were drawn.

    model: has `embed`, `modulations` and `extend`, see `models.var.VAR`. tokenizer: its `quantize` has embed_vectors(
    vectors, scale) -> (B, C, h, w) and next_input(f̂, scale) -> (B, p², C).
    """

    def __init__(self, model, labels: torch.Tensor, tokenizer):
        sides = model.config.patch_nums
        self.model, self.labels, self.quantizer = model, labels, tokenizer.quantize
        self.stops = torch.tensor([p * p for p in sides]).cumsum(0).tolist()
        self.starts = [0, *self.stops[:-1]]
        limits = torch.cat([torch.full((p * p,), stop) for p, stop in zip(sides, self.stops)])
        self.static = StaticScales.lent_to(self, model.config.seq_len, limits)  # where passes are captured, on a GPU
        self.caches = (
            two_caches(len(labels), model.config.seq_len, limits) if self.static is None else self.static.caches
        )
        self.modulations = [None, None]  # of the same, of all B images
        self.z = None  # (B, p², D) under the labels, of this step
        self.f_hat, self.num_summed = None, 0  # after so many scales
        self.inputs = None  # (B, L − F, C), those of the scales so far
        self.vectors = None  # (B, p², C) of the last scale, of which mixtures were drawn; None: its ids count
        self.drawn = None  # (B, p²) bool on the host: the tokens whose mixtures these are
        self.passes = 0.0

    def look(self, step: int, tokens, unknown, images):
        """(z (R, p², D), positions (R, p²) long on the host) of the tokens of scale `step` of images (R,) long."""
        self._sum_up(step, tokens)
        z = self._extend(step, images, labelled=True)
        self.z = z.new_zeros(len(self.labels), *z.shape[1:]).index_copy(0, send(images, z.device), z)
        return z, torch.arange(self.starts[step], self.stops[step]).expand(len(images), -1)

    def at(self, step: int, tokens, unknown, rows, guided):
        """(z (N, D), z without label (G, D) or None for none) at rows (N, 2) that `look` named."""
        start = torch.tensor([0, self.starts[step]])
        image, place = send(rows - start, tokens.device).unbind(dim=1)
        z = self.z[image, place]
        if not len(guided):
            return z, None
        some = rows[guided] - start
        images, which = some[:, 0].unique_consecutive(return_inverse=True)
        free = self._extend(step, images, labelled=False)
        which, place = send(torch.stack([which, some[:, 1]]), tokens.device).unbind()
        return z, free[which, place]

    def write(self, step: int, rows, drawn, weights=None) -> None:
        """The ids drawn (N,) at rows (N, 2) of scale `step`, which the next look reads from the tokens.

        weights (N, V): of the mixture of codes that takes their place.
        """
        if weights is None:
            return
        vectors = weights @ self.quantizer.embedding.weight.float()
        place = rows - torch.tensor([0, self.starts[step]])
        shape = len(self.labels), self.stops[step] - self.starts[step]
        self.drawn = torch.zeros(shape, dtype=torch.bool).index_put(place.unbind(1), torch.ones((), dtype=torch.bool))
        empty = vectors.new_zeros(*shape, vectors.shape[1])
        self.vectors = empty.index_put(send(place, vectors.device).unbind(1), vectors)

    def finished(self, tokens) -> torch.Tensor:
        """f̂ (B, C, h, w) of all scales of the tokens (B, L), mixtures where they were drawn."""
        self._sum_up(len(self.stops), tokens)
        return self.f_hat

    @torch.no_grad()
    def _sum_up(self, step: int, tokens) -> None:
        """Add to f̂ what the scales before `step` stand for, and note the inputs of the scales up to it."""
        while self.num_summed < step:
            scale = self.num_summed
            ids = tokens[:, self.starts[scale] : self.stops[scale]]
            codes = self.quantizer.embedding.weight[ids].float()
            if self.vectors is not None:
                mixed = send(self.drawn, codes.device).unsqueeze(-1)
                codes, self.vectors = torch.where(mixed, self.vectors, codes), None
            added = self.quantizer.embed_vectors(codes, scale)
            self.f_hat = added if self.f_hat is None else self.f_hat + added
            self.num_summed += 1
            if self.num_summed < len(self.stops):
                inputs = self.quantizer.next_input(self.f_hat, self.num_summed)
                self.inputs = inputs if self.inputs is None else torch.cat([self.inputs, inputs], dim=1)

    def _extend(self, step: int, images, labelled: bool) -> torch.Tensor:
        """z (R, p², D) of scale `step` of images (R,), once each of their sequences has all scales before it."""
        half = 0 if labelled else 1
        cache, stop = self.caches[half], self.stops[step]
        labels, inputs = self.labels if labelled else None, self.inputs
        if inputs is None:
            inputs = torch.zeros(len(self.labels), 0, self.model.config.vae_embed_dim, device=self.labels.device)
        if self.modulations[half] is None:
            made = self.model.modulations(labels, len(self.labels) if labelled else 1)
            self.modulations[half] = made if self.static is None else self.static.place(half, made)
        modulations = self.modulations[half]
        if self.static is not None and cache.is_even(images):
            name, extension = self.static.extend(half, stop, inputs.device)
            self.passes += extension.num_inputs / cache.capacity
            tensors = (inputs, labels) if labelled else (inputs,)
            function = pass_of_scale(self.model, modulations, extension)
            return self.model.graphs.run((self.static, name), function, tensors, [x.shape for x in tensors])
        extension = cache.extend(images, torch.full((len(images),), stop), inputs.device)
        self.passes += extension.num_inputs / cache.capacity
        index = extension.sequences
        if labelled and not extension.all:
            modulations = [vectors[index] for vectors in modulations]
        return self.model.extend(labels if labels is None else labels[index], inputs[index], modulations, extension)


def kept_tokens(keep: torch.Tensor, sides) -> torch.Tensor:
    """Which tokens (L,) bool of scales with these sides a mask keep (h, w) keeps, of numbers from 0 to 1 = keep.

    The mask is resized bilinearly to each scale, and a token kept where it is above 0.5. Scales of up to 3 tokens are
    kept whole.
    """
    keep, parts = keep.float()[None, None], []
    for side in sides:
        resized = F.interpolate(keep, (side, side), mode="bilinear").flatten()
        parts.append(torch.ones(side * side, dtype=torch.bool) if side * side <= 3 else resized > 0.5)
    return torch.cat(parts)
