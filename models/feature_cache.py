"""What the transformer computes during sampling, with keys and values kept from one autoregressive step to the next.

Legend: B images in the batch of generate(), B' of them looked at, L tokens, C channels of a token, S buffer tokens, D
width, H heads, n and w the new and the wanted tokens of an image (their maxima over the images). A slot is a place in
the sequence of S + L; one more slot takes padding.

Between whole passes the encoder computes only the tokens revealed since it last ran, the decoder these and the ones
that are wanted; all others keep the keys and values they had (the token cache of LazyMAR, arXiv 2503.12450, except that
which tokens changed is known here, and not searched for). With a whole pass every step nothing is kept or approximate.
"""

import torch
from torch.nn import functional as F

from models.mar import MAR
from util.dist import send


class FeatureCache:
    """Conditions z of the tokens of a batch, conditional on labels (B,) long, or unconditional (labels None)."""

    def __init__(self, mar: MAR, labels: torch.Tensor | None, batch_size: int, refresh_every: int = 1):
        """refresh_every: so many autoregressive steps apart are the passes over everything."""
        self.mar, self.labels, self.refresh_every = mar, labels, refresh_every
        self.refreshed = torch.full((batch_size,), -1)  # the last step with a whole pass, on the host
        self.known = torch.zeros(batch_size, mar.config.seq_len, dtype=torch.bool)  # to keys and values, on the host
        self.z = None  # (B, L, D) of the last whole pass
        self.stores = {}  # block: its keys and values (2, B, S + L + 1, H, D / H)
        self.passes = 0.0  # images that went through the transformer; a partial pass counts by its share of the tokens,
        # one that images share for each of them

    def look(self, step: int, tokens, unknown, images) -> torch.Tensor:
        """z (B', L, D) of images (B',) long on the host; where no whole pass is due, as it was at the last one.

        tokens (B, L, C) on the device, unknown (B, L) bool on the host.
        """
        last = self.refreshed[images]
        due = images[(last < 0) | (step // self.refresh_every > last // self.refresh_every)]
        if len(due):
            z = self._whole_pass(tokens, unknown, due)
            self.refreshed[due] = step
            if len(due) == len(tokens):
                self.z = z
            else:
                self.z = z.new_zeros(len(tokens), *z.shape[1:]) if self.z is None else self.z
                self.z[send(due, z.device)] = z
        return self.z if len(images) == len(tokens) else self.z[send(images, self.z.device)]

    def at(self, step: int, tokens, unknown, rows) -> torch.Tensor:
        """z (N, D) at rows (N, 2) long on the host, (image, position) in row-major order, of images that `look` saw."""
        image, position = send(rows, self.z.device).unbind(dim=1)
        z = self.z[image, position]
        stale = self.refreshed[rows[:, 0]] < step
        if stale.any():
            part = self._partial_pass(tokens, unknown, rows[stale])
            z[send(stale.nonzero().squeeze(1), z.device)] = part.to(z.dtype)
        return z

    def _whole_pass(self, tokens, unknown, images):
        """z (B', L, D), all tokens computed."""
        mar, size, hidden = self.mar, self.mar.config.buffer_size, unknown[images]
        self.passes += len(images)
        there = send(images, tokens.device)
        num_visible = (~hidden).sum(dim=1).tolist()
        # without a label and before anything is known all images are the same: one stands for them
        shared = self.labels is None and not any(num_visible)
        some = slice(0, 1) if shared else slice(None)
        labels = None if self.labels is None else self.labels[there]
        mask, num_visible, content = send(hidden, tokens.device)[some], num_visible[some], tokens[there[some]]
        if self.refresh_every == 1:
            z = mar.encode_decode(content, mask, labels, num_visible)
            return z.repeat(len(images), 1, 1) if shared else z

        self.known[images] = ~hidden
        visible, padding = mar.visible_positions(mask, num_visible)
        slots = torch.arange(size + mar.config.seq_len, device=tokens.device).expand(len(content), -1)
        places = visible if padding is None else visible.masked_fill(padding, mar.config.seq_len)
        seen = torch.cat([slots[:, :size], size + places], dim=1)

        def keeping(slots):
            return lambda blocks, x, mask: self._run(blocks, x, mask, there, slots, whole=True)

        encoded = mar.encode(content, visible, padding, labels, keeping(seen))
        z = mar.decode(encoded, visible, padding, keeping(slots))
        return z.repeat(len(images), 1, 1) if shared else z

    def _partial_pass(self, tokens, unknown, rows):
        """z (N, D) at rows (N, 2), new tokens and wanted ones computed."""
        mar, device = self.mar, tokens.device
        size, length = mar.config.buffer_size, mar.config.seq_len
        wanted = torch.zeros_like(self.known)
        wanted[rows[:, 0], rows[:, 1]] = True
        images = rows[:, 0].unique_consecutive()
        wanted, known = wanted[images], ~unknown[images]
        new = known & ~self.known[images]
        self.known[images] = known
        share = (2 * new.sum(dim=1) + wanted.sum(dim=1)) / (2 * size + length + known.sum(dim=1))
        self.passes += share.sum().item()

        new_at, wanted_at = _positions(new), _positions(wanted)
        real = (wanted_at < length).flatten().nonzero().squeeze(1)  # (N,), of B'·w; known here without waiting
        there, new_at, wanted_at, real = (send(x, device) for x in (images, new_at, wanted_at, real))
        # new tokens look at the buffer and at all that is known; padding reads any token, and writes where nobody looks
        keys = torch.cat([known.new_ones(len(images), size), known], dim=1)
        keys = send(keys, device)[:, None, None, :]
        x = mar.embed_tokens(tokens[there], new_at.clamp(max=length - 1))  # (B', n, D)
        x = mar.encoder_norm(self._run(mar.encoder_blocks, x, keys, there, size + new_at))
        # new and wanted tokens look at everything
        x = mar.decoder_embed(x)
        mask_token = mar.mask_token.to(x.dtype).expand(len(images), wanted_at.shape[1], -1)
        at = torch.cat([new_at, wanted_at], dim=1)  # (B', n + w)
        pos = mar.decoder_pos_embed_learned[0, size:][at.clamp(max=length - 1)]
        x = torch.cat([x, mask_token], dim=1) + pos.to(x.dtype)
        x = mar.decoder_norm(self._run(mar.decoder_blocks, x, None, there, size + at))[:, new_at.shape[1] :]
        z = x + mar.diffusion_pos_embed_learned[0][wanted_at.clamp(max=length - 1)]
        return z.flatten(0, 1)[real]

    def _run(self, blocks, x, mask, images, slots, whole=False):
        """x (B', ·, D) through the blocks; keys and values are written to slots (B', ·) of the images (B',).

        Of x (1, ·, D) and slots (1, ·), which stand for all images, they are written to each.
        whole: x looks at itself, else at all slots but the last; both where the bool mask allows.
        """
        rows = images[:, None]
        for block in blocks:
            attention = block.attn
            qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
            query, key, value = qkv.unbind(dim=2)  # each (B', ·, H, D / H)
            if block not in self.stores:
                num_slots = self.mar.config.buffer_size + self.mar.config.seq_len + 1
                self.stores[block] = key.new_zeros(2, len(self.known), num_slots, *key.shape[2:])
            kept = self.stores[block]
            kept[0][rows, slots], kept[1][rows, slots] = key, value
            if not whole:
                key, value = (kept[:, images] if len(images) < kept.shape[1] else kept)[:, :, :-1]
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            looked = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = x + attention.proj(looked.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return x


def _positions(chosen):
    """Positions (B', n) where chosen (B', L) is True, in order; rows with fewer are filled up with L."""
    length = chosen.shape[1]
    places = torch.where(chosen, torch.arange(length), length).sort(dim=1).values
    return places[:, : int(chosen.sum(dim=1).max())]
