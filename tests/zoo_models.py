"""The models of the zoo that are written by hand; what ``models`` has is used by other tests too."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import models
from models import HEADS, KV_HEADS, LONGEST, VOCABULARY, WIDTH


class Titan(nn.Module):
    """In the style of torchtitan's Llama: complex rotations, RMS norms, grouped heads repeated by expand."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.norm, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, KV_HEADS * 8, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.w2 = nn.Linear(48, WIDTH, bias=False)
        angles = torch.outer(torch.arange(LONGEST), 10000.0 ** -(torch.arange(0, 8, 2) / 8))
        self.angles: Tensor
        self.register_buffer("angles", angles)

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = self.words(ids)
        turns = torch.polar(torch.ones_like(self.angles), self.angles)[positions][:, :, None]
        h = self.norm(x)
        q, k, v = (w(h).view(*ids.shape, -1, 8) for w in (self.wq, self.wk, self.wv))
        q, k = (torch.view_as_real(_complex(t) * turns).flatten(3) for t in (q, k))
        k, v = (t[:, :, :, None, :].expand(*t.shape[:3], HEADS // KV_HEADS, 8).flatten(2, 3) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = self.attend(q, k, v, documents).transpose(1, 2).reshape(x.shape)
        return self.rest(x + self.wo(y), labels)

    def rest(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.fed_forward(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    def fed_forward(self, x: Tensor) -> Tensor:
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        if self.attention == "flex":
            length = q.shape[2]
            blocks = flex.create_block_mask(
                lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j]),
                q.shape[0], None, length, length, device="cpu",
            )  # fmt: skip
            return flex.flex_attention(q, k, v, _capped, blocks)
        same = documents[:, None, :, None] == documents[:, None, None, :]
        mask = same & torch.ones_like(same).tril()
        if self.attention == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask)
        return (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -torch.inf).softmax(-1) @ v


class Tiled(Titan):
    """What is token-wise is computed tile by tile, as for very long rows: layers are computed again in the
    backward, and nobody holds the logits of more than one tile."""

    def rest(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([checkpoint(self.fed_forward, part, use_reentrant=False) for part in x.chunk(3, 1)], 1)
        total, parts = x.new_zeros(()), zip(x[:, :-1].chunk(4, 1), labels[:, 1:].chunk(4, 1), strict=True)
        for rows, wanted in parts:
            logits = self.head(rows).flatten(0, 1)
            total = total + F.cross_entropy(logits, wanted.flatten(), reduction="sum")
        return total / (labels[:, 1:] != -100).sum(), x


def _capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    score = 5.0 * torch.tanh(score / 5.0) * (h + 2) / 3
    return torch.where(i - j > 5, score * 0.5, score)


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


class EncoderDecoder(nn.Module):
    """torch.nn.Transformer; source and target are packed alike."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.body = nn.Transformer(WIDTH, HEADS, 1, 1, 48, dropout=0.0, batch_first=True)

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = self.words(ids)
        other = documents[0][:, None] != documents[0]
        hidden = self.body(
            x, x.flip(-1), other, other | torch.ones_like(other).triu(1), other,
            src_is_causal=False, tgt_is_causal=False,
        )  # fmt: skip
        logits = self.head(hidden)
        return F.cross_entropy(logits.mT, labels), logits


class Joint(nn.Module):
    """A diffusion transformer's block: each modality has its own weights, attention is over both.

    ``streams``: 1, one row in which texts are causal and images see all of their document; 2, two rows that
    are joined for attention alone.
    """

    def __init__(self, streams: int) -> None:
        super().__init__()
        self.streams = streams
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.qkv, self.out = (nn.ModuleList(nn.Linear(WIDTH, n * WIDTH) for _ in range(2)) for n in (3, 1))
        self.modulate = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = self.words(ids)
        shift, scale = self.modulate(
            torch.sin(documents[..., None] + torch.arange(WIDTH).to(x.dtype) / 7)
        ).chunk(2, -1)
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        image = (documents % 2 == 1)[..., None]
        same, i = documents[:, None, :, None] == documents[:, None, None], torch.arange(ids.shape[1])
        if self.streams == 1:
            qkv = torch.where(image, self.qkv[0](h), self.qkv[1](h))
            mask = same & ((i[:, None] >= i) | image[:, None])
        else:
            qkv = torch.cat([self.qkv[0](h), self.qkv[1](h * 0.5)], 1)
            mask = same.repeat(1, 1, 2, 2)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        if self.streams == 1:
            y = torch.where(image, self.out[0](y), self.out[1](y))
        else:
            y = self.out[0](y[:, : ids.shape[1]]) + self.out[1](y[:, ids.shape[1] :])
        logits = self.head(x + y)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Adapted(nn.Module):
    """Low-rank adapters on every linear layer of a frozen model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, _LowRank(child))

    def forward(self, **given: Any) -> Any:
        return self.model(**given)


class _LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 3, bias=False)
        self.up = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Checkpointed(models.Nano):
    """A model that checkpoints its blocks itself, one of them inside of another."""

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, ...]:
        def inner(hidden: Tensor) -> Tensor:
            return hidden + checkpoint(
                lambda y: F.gelu(self.head(y)) @ self.head.weight, hidden, use_reentrant=False
            )

        loss, logits = checkpoint(super().forward, ids, labels, documents, positions, use_reentrant=False)
        return loss + checkpoint(inner, self.words(ids), use_reentrant=False).square().mean(), logits


class Prompted(nn.Module):
    """A frozen model that is taught by what stands in front of the tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prompt = nn.Parameter(torch.empty(5, WIDTH))

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, use_cache: bool) -> Any:
        given, count = self.model.get_input_embeddings()(input_ids), len(self.prompt)
        front = torch.arange(count).expand(len(given), -1)
        return self.model(
            inputs_embeds=torch.cat([self.prompt.expand(len(given), -1, -1), given], 1),
            position_ids=torch.cat([front, position_ids + count * (position_ids == 0).cumsum(1).eq(1)], 1),
            labels=F.pad(labels, (count, 0), value=-100),
            use_cache=use_cache,
        )
