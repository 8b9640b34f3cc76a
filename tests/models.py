"""Tiny models with random weights, and batches of packed documents for them.

Weights are large enough for attention to be sharp: a query that sees a key of another document, or misses
one of its own, changes the loss in the first digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, LONGEST = 61, 32, 2, 4, 2, 256
WINDOW = 6
Rows = Sequence[Sequence[int]]  # the lengths of the documents of every row of a batch


def build(name: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, **changes: Any) -> nn.Module:
    """The model ``name`` of ``MODELS``; ``changes`` go to its configuration."""
    torch.manual_seed(seed)
    model = _hugging_face(name, changes) if name in HUGGING_FACE else OWN[name](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 / math.sqrt(WIDTH))
            else:  # norms and biases, so that no gradient is zero by symmetry
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def batch(name: str, rows: Rows, *, seed: int = 0) -> dict[str, Any]:
    """What ``build(name)`` is called with: one packed row for each of ``rows``, which are equally long."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(rows), sum(rows[0])), generator=g)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    labels = ids.masked_fill(positions == 0, -100)
    if name in HUGGING_FACE:
        return {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}
    return {"ids": ids, "labels": labels, "documents": documents, "positions": positions}


def difference(compiled: Callable[..., Any], model: nn.Module, reference: nn.Module, given: Any) -> float:
    """The largest relative error of outputs and gradients of ``compiled`` (``model``) to ``reference``."""
    got, wanted = _step(compiled, model, given), _step(reference, reference, given)
    assert got.keys() == wanted.keys()
    largest = max(float(v.abs().max()) for k, v in wanted.items() if k.startswith("gradient"))
    errors = [
        float((got[key] - value).abs().max()) / max(float(value.abs().max()), 1e-3 * largest)
        for key, value in wanted.items()
    ]
    return max(errors)


def _step(function: Callable[..., Any], model: nn.Module, given: Any) -> dict[str, Tensor]:
    model.zero_grad()
    result = function(**given)
    loss, logits = result[:2] if isinstance(result, tuple) else (result.loss, result.logits)
    loss.backward()
    gradients = {f"gradient of {k}": whole(p.grad) for k, p in model.named_parameters() if p.grad is not None}
    outputs = {"loss": loss.detach(), "logits": logits.detach()}
    return {key: value.double() for key, value in (outputs | gradients).items()}


def error_of_mean(model: nn.Module, references: Sequence[nn.Module]) -> float:
    """The largest relative difference of gradients of ``model`` from the mean of those of ``references``."""
    errors = []
    for p, *wanted in zip(model.parameters(), *(r.parameters() for r in references), strict=True):
        mean = torch.stack([w.grad for w in wanted if w.grad is not None]).mean(0)
        assert p.grad is not None
        errors.append(float((whole(p.grad) - mean).abs().max() / mean.abs().max()))
    return max(errors)


def whole(x: Tensor) -> Tensor:
    """``x`` of all ranks, if it is distributed over them."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# --- Hugging Face -------------------------------------------------------------------------------------


def _common(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": LONGEST,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


_LOCAL_GLOBAL = {
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW,
    "num_hidden_layers": 2,
}  # fmt: skip
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **_LOCAL_GLOBAL}

#: name: (configuration class, arguments)
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _common(num_hidden_layers=LAYERS)),
    "qwen2": ("Qwen2Config", _common()),
    "qwen3": ("Qwen3Config", _common(head_dim=8)),
    "mistral": ("MistralConfig", _common(sliding_window=WINDOW)),
    "gemma2": ("Gemma2Config", _common(**_GEMMA)),
    "gemma3": ("Gemma3TextConfig", _common(**_GEMMA)),
    "phi3": ("Phi3Config", _common()),
    "olmo2": ("Olmo2Config", _common()),
    "gpt-neox": ("GPTNeoXConfig", {k: v for k, v in _common().items() if k != "num_key_value_heads"}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY, "n_positions": LONGEST, "n_embd": WIDTH, "n_layer": 1, "n_head": HEADS,
            "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
    ),
}  # fmt: skip


def _hugging_face(name: str, changes: dict[str, Any]) -> nn.Module:
    kind, arguments = HUGGING_FACE[name]
    how = changes.pop("attn_implementation", "eager" if name == "gemma2" else "sdpa")
    config = getattr(transformers, kind)(**{**arguments, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=how)
    model.loss_type = "ForCausalLM"  # GPT-2's head logs a warning without it, which dynamo does not trace
    return model


# --- our own ------------------------------------------------------------------------------------------


class Nano(nn.Module):
    """In the style of nanoGPT: learned positions, one projection for q, k and v, tied embeddings.

    ``attention``: "causal" (no documents), "mask" (documents and causal), "written out" (softmax in Python).
    """

    def __init__(self, attention: str = "mask", tied: bool = True) -> None:
        super().__init__()
        self.attention = attention
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(WIDTH), "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                    "out": nn.Linear(WIDTH, WIDTH),
                    "norm2": nn.LayerNorm(WIDTH), "up": nn.Linear(WIDTH, 48), "down": nn.Linear(48, WIDTH),
                }
            )
            for _ in range(LAYERS)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, ...]:
        x = self.words(ids) + self.places(positions)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        mask = (documents[:, :, None] == documents[:, None, :])[:, None] & causal
        for block in self.blocks:
            q, k, v = (
                part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for part in block["qkv"](block["norm"](x)).chunk(3, -1)
            )
            if self.attention == "causal":
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            elif self.attention == "mask":
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            else:
                scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
                y = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
            x = x + block["out"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1)), logits


class Encoder(nn.Module):
    """torch.nn's own layers, documents in a mask (S, S) that all rows share."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.places = nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, ...]:
        x = self.words(ids) + self.places(positions)
        mask = documents[0][:, None] != documents[0][None, :]
        for layer in self.layers:
            if isinstance(layer, nn.MultiheadAttention):
                x = x + layer(x, x, x, attn_mask=mask, need_weights=False)[0]
            else:
                x = layer(x, src_mask=mask)
        logits = self.head(x)
        return F.cross_entropy(logits.transpose(1, 2), labels), logits


class TokenShift(nn.Module):
    """In the style of RWKV: every projection reads a mixture of a token and the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in "qkvogwr"})
            for _ in range(LAYERS)
        )
        self.shares = nn.Parameter(torch.linspace(0.1, 0.9, LAYERS * 5 * WIDTH).view(LAYERS, 5, WIDTH))

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, ...]:
        x = self.words(ids)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        mask = (documents[:, :, None] == documents[:, None, :])[:, None] & causal
        for block, shares in zip(self.blocks, self.shares, strict=True):
            h = F.layer_norm(x, (WIDTH,))
            mixed = [torch.lerp(self.shift(h), h, share) for share in shares[:3]]
            q, k, v = (
                block[name](m).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for name, m in zip("qkv", mixed, strict=True)
            )
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block["o"](y.transpose(1, 2).flatten(2))
            h = F.layer_norm(x, (WIDTH,))
            before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
            gate, value = (h + (before - h) * share for share in shares[3:])
            x = x + block["g"](gate).sigmoid() * block["w"](F.relu(block["r"](value)) ** 2)
        logits = self.head(F.layer_norm(x, (WIDTH,)))
        return F.cross_entropy(logits.transpose(1, 2), labels), logits


class CausalConvolutions(nn.Module):
    """In the style of Hyena and Mamba: a short convolution of every channel, a dilated one, and gates."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.short = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 4, groups=3 * WIDTH, padding=3)
        self.wide = nn.Conv1d(WIDTH, WIDTH, 3, dilation=2, groups=2)

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, ...]:
        x = self.words(ids)
        short = self.short(self.project(F.layer_norm(x, (WIDTH,))).mT)[..., : ids.shape[1]]
        gate, value, more = F.silu(short).chunk(3, 1)
        wide = self.wide(F.pad(value * more, (4, 0)))
        x = x + self.out((gate * wide).mT)
        logits = self.head(F.layer_norm(x, (WIDTH,)))
        return F.cross_entropy(logits.transpose(1, 2), labels), logits


class NextToken(nn.Module):
    """A model under a wrapper that cuts what it is given: every token but the last predicts the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Nano()

    def forward(
        self, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor
    ) -> tuple[Tensor, ...]:
        return self.model(ids[:, :-1], labels[:, 1:].contiguous(), documents[:, :-1], positions[:, :-1])  # type: ignore[no-any-return]


OWN: dict[str, Callable[..., nn.Module]] = {
    "nano": Nano,
    "nano causal": lambda **changes: Nano("causal", **changes),
    "nano written out": lambda **changes: Nano("written out", **changes),
    "next token": NextToken,
    "encoder": lambda: Encoder(lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True)),
    "token shift": TokenShift,
    "causal convolutions": CausalConvolutions,
    "multihead": lambda: Encoder(lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)),
}
MODELS = (*HUGGING_FACE, *OWN)

#: Relative error allowed in float64: Hugging Face takes norms, softmax or the loss to float32 in some models.
TOLERANCE = {name: 2e-6 if name in HUGGING_FACE else 1e-11 for name in MODELS}
