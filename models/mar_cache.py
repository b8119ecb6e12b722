"""What the transformer computes during sampling, with keys and values kept from one autoregressive step to the next.

Legend: B images in the batch of generate(), B' of them looked at, L tokens, C channels of a token, S buffer tokens, D
width, H heads, n and w the new and the wanted tokens of an image (their maxima over the images). A slot is a place in
the sequence of S + L; one more slot takes padding.

Between whole passes the encoder computes only the tokens revealed since it last ran, the decoder these and the ones
that are wanted; all others keep the keys and values they had (the token cache of LazyMAR, arXiv 2503.12450, except that
which tokens changed is known, and not searched for). With a whole pass every step nothing is kept or approximate.
"""

from functools import partial

import torch
from torch.nn import functional as F

from models.compiled import run_part
from models.kv_cache import expanded, put
from models.passes import padded_counts, whole_pass
from models.vit import Block
from util.dist import send


class Features:
    """Keys and values of R sequences, and the passes that write and read them.

    Where passes are captured they stay in one place, for one batch after the other.
    """

    def __init__(self, mar, room: int):
        self.mar, self.room = mar, room
        self.stores = {}  # block: its keys and its values, each (R, S + L + 1, H, D / H)

    @classmethod
    def lent_to(cls, conditions: "FeatureCache") -> "Features | None":
        """Those of the conditions' model, emptied, see `Graphs.lend`."""
        mar, device, size = conditions.mar, conditions.labels.device, len(conditions.labels)
        features = mar.graphs.lend(mar, conditions, device, size, lambda: cls(mar, size))
        for pair in features.stores.values() if features else ():  # what is masked counts nothing, but 0 · NaN is NaN
            torch._foreach_zero_(pair)
        return features

    def make_room(self) -> None:
        """For twice as many sequences; captures, which read the old ones, are dropped."""
        self.room *= 2
        for block, pair in self.stores.items():
            self.stores[block] = [torch.cat([kept, torch.zeros_like(kept)]) for kept in pair]
        if self.mar.graphs.state is self:
            self.mar.graphs.captures.clear()

    def whole(self, tokens, mask, sequences, labels=None, *, num_visible) -> torch.Tensor:
        """z (R', L, D) of tokens (R', L, C) with mask (R', L), all computed; sequences (R',), or R' is 1 for all."""
        mar, size, length = self.mar, self.mar.config.buffer_size, self.mar.config.seq_len
        visible, padding = mar.visible_positions(mask, num_visible)
        slots = torch.arange(size + length, device=tokens.device).expand(len(tokens), -1)
        places = visible if padding is None else visible.masked_fill(padding, length)
        seen = torch.cat([slots[:, :size], size + places], dim=1)

        def keeping(slots):
            return lambda blocks, x, mask: self._run(blocks, x, mask, sequences, slots)

        encoded = mar.encode(tokens, visible, padding, labels, keeping(seen))
        return mar.decode(encoded, visible, padding, keeping(slots))

    def partial(self, tokens, new_at, wanted_at, keys, sequences, *, num_first) -> torch.Tensor:
        """z (R', w, D) of wanted tokens, new and wanted ones computed, of tokens (R', L, C).

        new_at (R', n), wanted_at (R', w) long: their positions, L for padding; keys (R', S + L) bool: what new tokens
        look at. num_first: as in `_run`.
        """
        mar, size, length = self.mar, self.mar.config.buffer_size, self.mar.config.seq_len
        run = partial(self._run, sequences=sequences, num_first=num_first, whole=False)
        # padding reads any token, and writes where nobody looks
        x = mar.embed_tokens(tokens, new_at.clamp(max=length - 1))  # (R', n, D)
        x = mar.encoder_norm(run(mar.encoder_blocks, x, keys[:, None, None, :], slots=size + new_at))
        # new and wanted tokens look at everything
        x = mar.decoder_embed(x)
        mask_token = mar.mask_token.to(x.dtype).expand(len(x), wanted_at.shape[1], -1)
        at = torch.cat([new_at, wanted_at], dim=1)  # (R', n + w)
        pos = mar.decoder_pos_embed_learned[0, size:][at.clamp(max=length - 1)]
        x = torch.cat([x, mask_token], dim=1) + pos.to(x.dtype)
        x = mar.decoder_norm(run(mar.decoder_blocks, x, None, slots=size + at))[:, new_at.shape[1] :]
        return x + mar.diffusion_pos_embed_learned[0][wanted_at.clamp(max=length - 1)]

    def _run(self, blocks, x, mask, sequences, slots, num_first: int | None = None, whole: bool = True):
        """x (R', ·, D) through the blocks; keys and values are written to slots (R', ·) of the sequences (R',).

        Of x (1, ·, D) and slots (1, ·), which stand for all of them, they are written to each.
        whole: x looks at itself, else at all slots but the last; both where the bool mask allows. num_first: the
        sequences are the first so many, None: any.
        """
        index = expanded(sequences[:, None], slots)
        for block in blocks:
            heads = run_part(Block.before_attention, block, x)  # (R', ·, 3, H, D / H)
            query, key, value = heads.unbind(dim=2)
            if block not in self.stores:
                num_slots = self.mar.config.buffer_size + self.mar.config.seq_len + 1
                self.stores[block] = [key.new_zeros(self.room, num_slots, *key.shape[2:]) for _ in range(2)]
            pair = [put(kept, index, new) for kept, new in zip(self.stores[block], (key, value))]
            self.stores[block] = pair
            if not whole:
                key, value = ((kept[sequences] if num_first is None else kept[:num_first])[:, :-1] for kept in pair)
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            looked = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = run_part(Block.after_attention, block, x, looked.transpose(1, 2))
        return x


class FeatureCache:
    """Conditions z of the tokens of a batch, each image with its label (B,) long and, where guided, without one.

    The `models.families.Conditions` of a MAR. Image i has two sequences, i with its label and B + i without: between
    whole passes both go through the transformer in one batch.
    """

    def __init__(self, mar, labels: torch.Tensor, refresh_every: int = 1, recompute: bool = False):
        """refresh_every: so many autoregressive steps apart are the passes over everything.

        recompute: where that is every step, the backward pass computes their activations again.
        """
        self.whole = whole_pass(mar, recompute)
        self.mar, self.labels, self.refresh_every = mar, labels, refresh_every
        self.refreshed = torch.full((2 * len(labels),), -1)  # the last step with a whole pass, on the host
        self.known = torch.zeros(2 * len(labels), mar.config.seq_len, dtype=torch.bool)  # to keys and values, likewise
        self.static = None if refresh_every == 1 else Features.lent_to(self)  # where passes are captured, on a GPU
        self.features = self.static or Features(mar, len(labels))  # of B sequences until there is guidance
        self.z = None  # (R, L, D) of the last whole pass
        self.passes = 0.0  # sequences that went through the transformer; a partial pass counts by its share of the
        # tokens, one that sequences share for each of them

    def look(self, step: int, tokens, unknown, images) -> tuple[torch.Tensor, None]:
        """(z (B', L, D) with labels, None: it is of all positions) of images (B',) long on the host.

        Where no whole pass is due, z is that of the last one. tokens (B, L, C) on the device, unknown (B, L) bool on
        the host.
        """
        self._refresh(step, tokens, unknown, images, labelled=True)
        return self.z[send(images, self.z.device)], None

    def at(self, step: int, tokens, unknown, rows, guided):
        """(z (N, D), z without label (G, D) or None for none) of images that `look` saw.

        rows (N, 2) long on the host, (image, position) in row-major order; guided (G,) long on the host, which of them
        are wanted without label too.
        """
        if len(guided):
            free = rows[guided]
            self._refresh(step, tokens, unknown, free[:, 0].unique_consecutive(), labelled=False)
            free = free + torch.tensor([len(tokens), 0])
            both = torch.cat([rows, free])
        else:
            both = rows
        sequence, position = send(both, self.z.device).unbind(dim=1)
        z = self.z[sequence, position]
        stale = self.refreshed[both[:, 0]] < step
        if stale.any():
            part = self._partial_pass(tokens, unknown, both[stale])
            z = put(z, (send(stale.nonzero().squeeze(1), z.device),), part.to(z.dtype))
        return z[: len(rows)], z[len(rows) :] if len(guided) else None

    def write(self, step: int, rows, drawn) -> None:
        """Nothing to keep: what was drawn is read from the tokens at the next look."""

    def _refresh(self, step, tokens, unknown, images, labelled):
        """A whole pass over those of the images that one is due for."""
        first = 0 if labelled else len(tokens)
        last = self.refreshed[first + images]
        images = images[(last < 0) | (step // self.refresh_every > last // self.refresh_every)]
        if len(images):
            sequences = first + images
            if not labelled and self.features.room == len(tokens):
                self.features.make_room()
            z = self._whole_pass(tokens, unknown, images, sequences, labelled)
            if self.z is None:
                self.z = z.new_zeros(self.features.room, *z.shape[1:])
            elif len(self.z) < self.features.room:
                self.z = torch.cat([self.z, torch.zeros_like(self.z)])
            self.z = put(self.z, (send(sequences, z.device),), z)
            self.refreshed[sequences] = step

    def _whole_pass(self, tokens, unknown, images, sequences, labelled):
        """z (B', L, D), or (1, L, D) of images that do not differ, all tokens computed."""
        hidden = unknown[images]
        self.passes += len(images)
        index = send(images, tokens.device)
        num_visible = (~hidden).sum(dim=1).tolist()
        # without a label and before anything is known all images are the same: one stands for them
        some = slice(0, None if labelled or any(num_visible) else 1)
        labels = self.labels[index] if labelled else None
        mask, num_visible, content = send(hidden, tokens.device)[some], num_visible[some], tokens[index[some]]
        if self.refresh_every == 1:
            return self.whole(content, mask, labels, num_visible)
        self.known[sequences] = ~hidden
        tensors = [content, mask, send(sequences, tokens.device), *([labels] if labelled else [])]
        counts = num_visible if self.static is None else padded_counts(num_visible, mask.shape[1])
        function = partial(self.features.whole, num_visible=counts)
        return self._captured(("whole", tuple(counts), labelled), function, tensors)

    def _partial_pass(self, tokens, unknown, rows):
        """z (N, D) at rows (N, 2) of sequences and positions, new tokens and wanted ones computed."""
        device, size, length = tokens.device, self.mar.config.buffer_size, self.mar.config.seq_len
        wanted = torch.zeros_like(self.known)
        wanted[rows[:, 0], rows[:, 1]] = True
        sequences = rows[:, 0].unique_consecutive()
        images = sequences % len(tokens)
        wanted, known = wanted[sequences], ~unknown[images]
        new = known & ~self.known[sequences]
        self.known[sequences] = known
        share = (2 * new.sum(dim=1) + wanted.sum(dim=1)) / (2 * size + length + known.sum(dim=1))
        self.passes += share.sum().item()

        new_at, wanted_at = self._positions(new), self._positions(wanted)
        real = (wanted_at < length).flatten().nonzero().squeeze(1)  # (N,), of B'·w; on the host without waiting
        keys = torch.cat([known.new_ones(len(known), size), known], dim=1)  # the buffer, and all that is known
        on_host = (images, new_at, wanted_at, keys, sequences, real)
        index, new_at, wanted_at, keys, stored, real = (send(x, device) for x in on_host)
        num_first = len(sequences) if sequences[-1] == len(sequences) - 1 else None
        function = partial(self.features.partial, num_first=num_first)
        z = self._captured(("partial", num_first), function, [tokens[index], new_at, wanted_at, keys, stored])
        return z.flatten(0, 1)[real]

    def _positions(self, chosen) -> torch.Tensor:
        """Positions (B', n) where chosen (B', L) is True, in order; rows with fewer are filled up with L."""
        length, counts = chosen.shape[1], chosen.sum(dim=1).tolist()
        places = torch.where(chosen, torch.arange(length), length).sort(dim=1).values
        return places[:, : max(counts) if self.static is None else padded_counts(counts, length)[1]]

    def _captured(self, key, function, tensors) -> torch.Tensor:
        """function(*tensors), of a graph where keys and values stay in one place."""
        return function(*tensors) if self.static is None else self.mar.graphs.run_again(key, function, tensors)
