"""Keys and values, kept from one step to the next, and the conditions that a causal model makes with them.

Legend: B images, R sequences, R' of them looked at, L tokens, n inputs of a sequence that are new (the maximum over the
sequences), H heads, d width of a head, D width of z, G guided tokens. Input i of a sequence stands for the token before
the i-th of its order, the label for i = 0; its output is z of the i-th.
"""

import torch
from torch.nn import functional as F

from util.dist import send


class KeyValueCache:
    """The keys and values of R sequences of at most L inputs, layer by layer, each 2 · R · H · L · d numbers.

    A sequence may lag behind the others: each pass gives it all the inputs that it lacks. limits (L,) long: input i
    looks at the inputs 0 … limits[i] − 1, None: at those before it and itself.
    """

    def __init__(self, num_sequences: int, capacity: int, limits: torch.Tensor | None = None):
        self.capacity = capacity
        limits = torch.arange(1, capacity + 1) if limits is None else limits
        self.limits = torch.cat([limits, torch.tensor([capacity + 1])])  # of each slot; padding may look at anything
        self.lengths = torch.zeros(num_sequences, dtype=torch.long)  # inputs that are kept, on the host
        self.stores = {}  # layer: its keys and its values, each (R, L + 1, H, d); the last slot takes padding
        # In memory the inputs of a head stand beside each other, since attention reads head after head.

    def is_even(self, sequences: torch.Tensor) -> bool:
        """Are sequences (R',) all that there are, of one length?"""
        return len(sequences) == len(self.lengths) and bool((self.lengths == self.lengths[0]).all())

    def extend(self, sequences: torch.Tensor, lengths: torch.Tensor, device) -> "Extension":
        """The pass that brings sequences (R',) long to lengths (R',) long, greater than theirs; both on the host."""
        extension = Extension(self, sequences, self.lengths[sequences], lengths, device)
        self.lengths[sequences] = lengths
        return extension


class Extension:
    """One pass over the inputs that some sequences lack.

    places (R', n) long: which inputs these are; a sequence that lacks fewer than the others repeats its last one.
    last_places (R', 1) long: its last one. num_inputs: of all sequences, without the repeated ones.
    """

    def __init__(self, cache: KeyValueCache, sequences, start, stop, device):
        counts = stop - start
        slots = start.unsqueeze(1) + torch.arange(int(counts.max()))  # (R', n)
        last = stop.unsqueeze(1) - 1
        slots_or_padding = slots.masked_fill(slots > last, cache.capacity)
        limits = cache.limits[slots_or_padding]
        self.cache, self.num_inputs, self.num_keys = cache, int(counts.sum()), int(stop.max())
        self.all = len(sequences) == len(cache.lengths)
        self.sequences = send(sequences, device)
        self.places, self.last_places = send(torch.minimum(slots, last), device), send(last, device)
        self.index = expanded(self.sequences.unsqueeze(1), send(slots_or_padding, device))  # where keys and values go
        self.ends = send(counts - 1, device)
        self.mask = None  # (R', 1, n, keys) bool; None: all keys may be looked at
        if (limits < self.num_keys).any():
            keys = torch.arange(self.num_keys, device=device)
            self.mask = (keys < send(limits, device).unsqueeze(-1)).unsqueeze(1)

    def attend(self, layer: int, query, key, value, scale: float | None = None) -> torch.Tensor:
        """What the new inputs find (R', n, H, d) among those before them and themselves; key and value are kept.

        query (R', n, H, d), key and value (R', n, H', d), where each of H' heads serves H / H' of the query's. scale:
        as in `attention`.
        """
        stores = self.cache.stores
        if layer not in stores:
            heads, width = key.shape[2:]
            shape = len(self.cache.lengths), heads, self.cache.capacity + 1, width
            stores[layer] = [key.new_zeros(shape).transpose(1, 2) for _ in range(2)]
        stores[layer] = [put(kept, self.index, new) for kept, new in zip(stores[layer], (key, value))]
        key, value = (kept[:, : self.num_keys] for kept in stores[layer])
        if not self.all:
            key, value = key[self.sequences], value[self.sequences]
        return attention(query, key, value, self.mask, scale=scale)

    def last(self, x: torch.Tensor, num: int = 1) -> torch.Tensor:
        """Of x (R', n, D) those of each sequence's last num inputs, (R', num, D)."""
        places = self.ends.unsqueeze(1) + torch.arange(1 - num, 1, device=x.device)
        return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class StaticCaches:
    """Two caches that stay in one place, where captured passes read and write them: with label, and without.

    They serve one batch of `size` images after the other, and one at a time.
    """

    def __init__(self, size: int, capacity: int, limits: torch.Tensor | None = None):
        self.size, self.caches, self.extensions = size, two_caches(size, capacity, limits), {}

    @classmethod
    def lent_to(cls, conditions, *sizes) -> "StaticCaches | None":
        """Those of the conditions' model, empty, see `Graphs.lend`; sizes: capacity, limits."""
        model, device, size = conditions.model, conditions.labels.device, len(conditions.labels)
        caches = model.graphs.lend(model, conditions, device, size, lambda: cls(size, *sizes))
        for cache in caches.caches if caches else ():
            cache.lengths.zero_()
        return caches

    def extend(self, half: int, stop: int, device) -> tuple[tuple, Extension]:
        """(its name, the pass that brings all sequences of a half from their common length to stop), made once."""
        lengths = self.caches[half].lengths
        name = (half, int(lengths[0]), stop)
        if name not in self.extensions:
            every = torch.arange(self.size), torch.full((self.size,), stop)
            self.extensions[name] = self.caches[half].extend(*every, device)
        lengths.fill_(stop)
        return name, self.extensions[name]


def two_caches(size: int, capacity: int, limits: torch.Tensor | None = None) -> list[KeyValueCache]:
    """With label, without."""
    return [KeyValueCache(size, capacity, limits) for _ in range(2)]


def attention(query, key, value, mask=None, *, causal: bool = False, dropout: float = 0.0, scale=None) -> torch.Tensor:
    """(B, n, H, d) of query (B, n, H, d), key and value (B, m, H', d), where mask (B, 1, n, m) bool allows.

    causal: input i looks at 0 … i, in place of a mask. scale: of q·k before the softmax, None: 1/√d.
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    options = dict(attn_mask=mask, is_causal=causal, dropout_p=dropout, scale=scale)
    found = F.scaled_dot_product_attention(query, key, value, **options)
    return found.transpose(1, 2)


def expanded(*index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Indices of one shape, contiguous; on a GPU each `put` would otherwise make them so anew."""
    return tuple(x.contiguous() for x in torch.broadcast_tensors(*index))


def put(kept, index: tuple, new):
    """kept[index] = new; where gradients are asked for in a copy, since they may need what was there before."""
    return kept.index_put(index, new) if torch.is_grad_enabled() else kept.index_put_(index, new)


def raster_only(orders: torch.Tensor | None) -> None:
    """None, which stands for row by row; orders (B, L) that are other ones raise ValueError."""
    if orders is not None and (orders != torch.arange(orders.shape[1], device=orders.device)).any():
        raise ValueError("a raster model draws row by row: it needs --order raster")


def check_prefix(unknown: torch.Tensor) -> None:
    """Raise ValueError where a known token of unknown (B, L) bool comes after an unknown one."""
    if (unknown[:, :-1] & ~unknown[:, 1:]).any():
        raise ValueError(
            "a raster model keeps only the first tokens of an image, row by row: the part to keep (--edit_mask) must "
            "end where the new one begins"
        )


class CausalConditions:
    """The `models.families.Conditions` of a causal model: z of one token an image, the next of its order.

    With guidance an image has a second sequence, without label, in a cache of its own. Where w was 1 that one lags
    behind, and catches up at the next guided step. Tokens that are given come first in the order.

    model: has extend(tokens (R', L, …), orders (R', L), labels (R',) or None, extension) -> z (R', 1, D), see
    `models.mar_ar.MARAR.extend`. orders (B, L) long, None: row by row, where only the first tokens can be given; others
    raise ValueError.
    """

    def __init__(self, model, labels: torch.Tensor, orders: torch.Tensor | None):
        batch, length = len(labels), model.config.seq_len
        self.model, self.labels, self.raster = model, labels, orders is None
        self.orders = torch.arange(length).repeat(batch, 1) if orders is None else orders.cpu()  # on the host
        self.on_device = None  # the same, known tokens first
        self.static = StaticCaches.lent_to(self, length)  # where passes are captured, on a GPU
        self.caches = two_caches(batch, length) if self.static is None else self.static.caches
        self.z = None  # (B, D) of each image's next token
        self.passes = 0.0

    def look(self, step: int, tokens, unknown, images):
        """(z (B', 1, D), positions (B', 1) long on the host) of images (B',) long on the host."""
        if self.on_device is None:
            self._put_known_first(unknown, tokens.device)
        z = self._extend(tokens, unknown, images, labelled=True)
        if self.z is None:
            self.z = z.new_zeros(len(self.labels), z.shape[-1])
        self.z = put(self.z, (send(images, z.device),), z.squeeze(1))
        return z, self.orders[images].gather(1, (~unknown[images]).sum(dim=1, keepdim=True))

    def at(self, step: int, tokens, unknown, rows, guided):
        """(z (N, D), z without label (G, D) or None for none) at rows (N, 2) that `look` named."""
        z = self.z[send(rows[:, 0], tokens.device)]
        if not len(guided):
            return z, None
        return z, self._extend(tokens, unknown, rows[guided, 0], labelled=False).squeeze(1)

    def write(self, step: int, rows, drawn) -> None:
        """Nothing to keep: what was drawn is read from the tokens at the next look."""

    def _put_known_first(self, unknown, device):
        later = unknown.gather(1, self.orders).to(torch.uint8)
        orders = self.orders.gather(1, later.argsort(dim=1, stable=True))
        if self.raster:
            check_prefix(unknown)
        self.orders, self.on_device = orders, send(orders, device)

    def _extend(self, tokens, unknown, images, labelled: bool):
        """z (·, 1, D) of the next token of the images, once each of their sequences has all that is known."""
        half, lengths = 0 if labelled else 1, (~unknown[images]).sum(dim=1) + 1
        cache = self.caches[half]
        if self.static is not None and cache.is_even(images) and (lengths == lengths[0]).all():
            return self._captured(half, int(lengths[0]), tokens)
        extension = cache.extend(images, lengths, tokens.device)
        self.passes += extension.num_inputs / cache.capacity
        index = extension.sequences
        labels = self.labels[index] if labelled else None
        return self.model.extend(tokens[index], self.on_device[index], labels, extension)

    def _captured(self, half: int, length: int, tokens) -> torch.Tensor:
        """The same of all sequences of a half, which get as long as this: of a graph, from the second time on."""
        name, extension = self.static.extend(half, length, tokens.device)
        self.passes += extension.num_inputs / self.caches[half].capacity
        tensors = [tokens, self.on_device, *([] if half else [self.labels])]
        return self.model.graphs.run_again(name, longer_sequences(self.model, extension), tensors)


def longer_sequences(model, extension: Extension):
    """z (B, 1, D) of each next token, a function of tokens, orders and, with label, labels; nothing else changes."""
    return lambda tokens, orders, labels=None: model.extend(tokens, orders, labels, extension)
