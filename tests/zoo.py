"""The models that people bring, tiny, with random weights and packed batches: ``ZOO``.

What Hugging Face and others call a model is a configuration here; nothing in the compiler knows these names.
``compare(entry, attention, *meshes)`` runs one of them on simulated ranks against one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention.flex_attention as flex
import transformers
from torch import Tensor, nn

import models
from models import HEADS, KV_HEADS, LONGEST, VOCABULARY, WIDTH, WINDOW
from simulate import Simulated, Step, eager, simulate, traced, widened, worst
from zoo_models import Adapted, Checkpointed, EncoderDecoder, Joint, Prompted, Tiled, Titan

DOCUMENTS = [5, 1, 9, 14, 3, 2]
S = sum(DOCUMENTS)
MESHES = ((3, 1), (2, 2))
Batch = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """``make(attention)`` builds the model, ``batch()`` what it is called with; ``attention`` are the
    implementations that it has; ``gathers`` how many operators run on gathered tokens."""

    make: Callable[[str], nn.Module]
    batch: Callable[[], Batch]
    attention: tuple[str, ...] = ("sdpa", "eager")
    gathers: int = 0
    warm_up: bool = False  # hooks that record outputs are put in place by a first call, which dynamo refuses
    kind: str = "decoder"


@dataclass(frozen=True)
class Result:
    """``error``: the largest relative error of outputs and gradients over ranks; ``gathers`` and where."""

    error: float
    gathers: tuple[str, ...]


def compare(entry: Entry, attention: str, *meshes: tuple[int, int]) -> list[Result]:
    """One step of the model on every rank of each of ``meshes``, in float64 throughout."""
    with flex_with_gradients():
        model, batch = entry.make(attention), entry.batch()
        if entry.warm_up:
            model.float()(**in_float32(batch))
        model.double()
        trace = widened(traced(model, batch))
        wanted = eager(trace)
        return [_result(simulate(trace, *mesh), wanted) for mesh in meshes]


def _result(got: Simulated, wanted: Step) -> Result:
    gathers = tuple(f"{f.operator} ({f.reason}), at {f.at}" for f in got.program.fallbacks)
    return Result(max(max(worst(step, wanted)) for step in got.ranks), gathers)


def in_float32(batch: Batch) -> Batch:
    """``batch`` for a model in float32."""
    return {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


class flex_with_gradients:
    """torch refuses gradients of flex attention on CPU, for want of a kernel: of its own."""

    def __enter__(self) -> None:
        self._check, flex._validate_device = flex._validate_device, lambda *_: None

    def __exit__(self, *_: Any) -> None:
        flex._validate_device = self._check


def _randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.0 / math.sqrt(WIDTH))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().train()


# --- Hugging Face -------------------------------------------------------------------------------------


def _config(name: str, **arguments: Any) -> Any:
    config = getattr(transformers, name)(**arguments)
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    return config


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": LONGEST,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def _old(**more: Any) -> dict[str, Any]:
    """The names that GPT-2's generation of configurations uses."""
    return {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, **more}


def _without_groups(**more: Any) -> dict[str, Any]:
    return {k: v for k, v in _text(**more).items() if k != "num_key_value_heads"}


def _packed(*without: str, **more: Any) -> Batch:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (1, S), generator=g)
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    labels = ids.masked_fill(positions == 0, -100)
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}
    return {k: v for k, v in {**batch, **more}.items() if k not in without}


def _causal(
    config: str, arguments: dict[str, Any], *, without: tuple[str, ...] = (), checkpointed: bool = False,
    forward: dict[str, Any] | None = None, **more: Any,
) -> Entry:  # fmt: skip
    def make(attention: str) -> nn.Module:
        model = transformers.AutoModelForCausalLM.from_config(
            _config(config, **arguments), attn_implementation=attention
        )
        model.loss_type = "ForCausalLM"
        if checkpointed:
            old = model.gradient_checkpointing_enable  # the name before transformers 5.24
            getattr(model, "activation_checkpointing_enable", old)()
        return _randomised(model)

    return Entry(make, lambda: _packed(*without, **(forward or {})), **more)


def _other(
    cls: str, config: str, arguments: dict[str, Any], batch: Callable[[], Batch], **more: Any
) -> Entry:
    def make(attention: str) -> nn.Module:
        model_class: Any = getattr(transformers, cls)
        return _randomised(
            model_class._from_config(_config(config, **arguments), attn_implementation=attention)
        )

    return Entry(make, batch, **more)


def _embedded() -> Batch:
    batch = _packed("input_ids", "labels")
    g = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, S, WIDTH, generator=g, dtype=torch.float64)
    batch["position_ids"] = torch.stack([batch["position_ids"]] * 4)
    return {"inputs_embeds": embeds, **batch}


def _summary() -> Batch:
    batch = _packed("position_ids")
    return batch | {"labels": batch["labels"][:, : S // 2]}


def _spoken() -> Batch:
    batch = _packed()
    g = torch.Generator().manual_seed(1)
    return {
        "input_features": torch.randn(1, 16, 64, generator=g, dtype=torch.float64),
        "decoder_input_ids": batch["input_ids"], "decoder_position_ids": batch["position_ids"],
        "labels": batch["labels"], "use_cache": False,
    }  # fmt: skip


_ALTERNATING = {
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "num_hidden_layers": 2,
}  # fmt: skip
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **_ALTERNATING}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
_LINEAR = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
_T5 = (
    "T5ForConditionalGeneration",
    "T5Config",
    {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 1,
        "num_heads": HEADS, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
    },
)  # fmt: skip
_WHISPER = {
    "vocab_size": VOCABULARY, "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": HEADS,
    "decoder_layers": 1, "decoder_attention_heads": HEADS, "d_model": WIDTH, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_source_positions": 32, "max_target_positions": LONGEST, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
_WRITTEN_OUT: dict[str, Any] = {"attention": ("eager",)}

HUGGING_FACE: dict[str, Entry] = {
    "Llama": _causal("LlamaConfig", _text()),
    "Llama, checkpointed": _causal("LlamaConfig", _text(num_hidden_layers=2), checkpointed=True),
    "Llama, hidden states": _causal(
        "LlamaConfig", _text(num_hidden_layers=2), forward={"output_hidden_states": True}, warm_up=True
    ),
    "Llama4": _causal(
        "Llama4TextConfig",
        _text(
            head_dim=8, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1,
            attention_chunk_size=8, interleave_moe_layer_step=2, num_hidden_layers=2,
        ),
    ),
    "Qwen2": _causal("Qwen2Config", _text()),
    "Qwen3": _causal("Qwen3Config", _text(head_dim=8)),
    "Qwen3-MoE": _causal("Qwen3MoeConfig", _text(head_dim=8, decoder_sparse_step=1, **_EXPERTS)),
    "Qwen3-MoE, router loss": _causal(
        "Qwen3MoeConfig",
        _text(
            head_dim=8, decoder_sparse_step=1, output_router_logits=True, num_hidden_layers=2, **_EXPERTS
        ),
        warm_up=True,
    ),
    "Qwen2-VL text": _other(
        "Qwen2VLTextModel",
        "Qwen2VLTextConfig",
        _text(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}),
        _embedded,
    ),
    "Mistral": _causal("MistralConfig", _text(sliding_window=WINDOW)),
    "Mixtral": _causal("MixtralConfig", _text(**_MIXTRAL)),
    "Mixtral, checkpointed": _causal("MixtralConfig", _text(**_MIXTRAL), checkpointed=True),
    "Mixtral, router loss": _causal(
        "MixtralConfig", _text(output_router_logits=True, num_hidden_layers=2, **_MIXTRAL), warm_up=True
    ),
    "Gemma2": _causal("Gemma2Config", _text(**_GEMMA), **_WRITTEN_OUT),
    "Gemma3": _causal("Gemma3TextConfig", _text(**_GEMMA)),
    "Phi3": _causal("Phi3Config", _text()),
    "OLMo2": _causal("Olmo2Config", _text()),
    "Cohere2": _causal("Cohere2Config", _text(**_ALTERNATING)),
    "GPT-2": _causal("GPT2Config", _old(n_positions=LONGEST, n_embd=WIDTH, n_layer=1, n_head=HEADS)),
    "GPT-J": _causal(
        "GPTJConfig", _old(n_positions=LONGEST, n_embd=WIDTH, n_layer=1, n_head=HEADS, rotary_dim=4)
    ),
    "GPT-NeoX": _causal("GPTNeoXConfig", _without_groups()),
    "OPT": _causal(
        "OPTConfig",
        _old(
            hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=1, num_attention_heads=HEADS, pad_token_id=0,
            max_position_embeddings=LONGEST, word_embed_proj_dim=WIDTH,
        ),
    ),
    "Bloom": _causal(
        "BloomConfig", _old(hidden_size=WIDTH, n_layer=1, n_head=HEADS), without=("position_ids",),
        **_WRITTEN_OUT,
    ),
    "Falcon": _causal(
        "FalconConfig", _old(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS)
    ),
    "Falcon, ALiBi": _causal(
        "FalconConfig",
        _old(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, alibi=True),
        without=("position_ids",),
    ),
    "DeepSeek-V2": _causal(
        "DeepseekV2Config",
        _text(
            num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, num_hidden_layers=2,
            **_LATENT,
        ),
    ),
    "DeepSeek-V3": _causal(
        "DeepseekV3Config",
        _text(
            num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, num_hidden_layers=2,
            **_LATENT,
        ),
    ),
    "GPT-OSS": _causal("GptOssConfig", _text(head_dim=8, **_MIXTRAL, **_ALTERNATING), **_WRITTEN_OUT),
    "BERT": _other(
        "BertForMaskedLM", "BertConfig", _without_groups(), lambda: _packed("use_cache"), kind="encoder"
    ),
    "ModernBERT": _other(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _without_groups(
            num_hidden_layers=2, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1,
            sep_token_id=2,
        ),
        lambda: _packed("use_cache"),
        kind="encoder",
    ),
    "T5": _other(*_T5, lambda: _packed("position_ids"), kind="encoder-decoder"),
    "T5, shorter labels": _other(
        *_T5, _summary, attention=("sdpa",), gathers=1, kind="encoder-decoder"
    ),
    "Whisper": _other(
        "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER, _spoken, kind="encoder-decoder"
    ),
    "Mamba2": _causal(
        "Mamba2Config",
        _old(
            hidden_size=WIDTH, num_hidden_layers=1, state_size=8, num_heads=8, head_dim=8, n_groups=1,
            chunk_size=8, pad_token_id=0,
        ),
        without=("position_ids",), attention=("eager",), gathers=5, kind="state space",
    ),
    "Jamba": _causal(
        "JambaConfig",
        _text(
            num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, num_hidden_layers=2,
        ),
        gathers=10, kind="state space",
    ),
    "Qwen3-Next": _causal(
        "Qwen3NextConfig", _text(head_dim=8, **_EXPERTS, **_LINEAR), gathers=5, kind="state space"
    ),
}  # fmt: skip


# --- others -------------------------------------------------------------------------------------------


def _prompted(attention: str) -> nn.Module:
    return _randomised(Prompted(HUGGING_FACE["Llama"].make(attention)))


def _own(make: Callable[[str], nn.Module], *attention: str, **more: Any) -> Entry:
    rows = [DOCUMENTS, DOCUMENTS[::-1]]
    return Entry(lambda how: _randomised(make(how)), lambda: models.batch("nano", rows), attention, **more)


def _nano(attention: str) -> nn.Module:
    return models.Nano("mask" if attention == "sdpa" else "written out")


OWN: dict[str, Entry] = {
    "nanoGPT": _own(_nano, "sdpa", "eager"),
    "nanoGPT, low-rank adapters": _own(lambda how: Adapted(_nano(how)), "sdpa"),
    "nanoGPT, checkpointed": _own(lambda how: Checkpointed(), "sdpa"),
    "nanoGPT, inputs cut inside": _own(lambda how: models.OWN["next token"](), "sdpa"),
    "Llama, soft prompt": Entry(_prompted, HUGGING_FACE["Llama"].batch),
    "torchtitan Llama": _own(Titan, "sdpa", "eager", "flex"),
    "torchtitan Llama, tiled": _own(Tiled, "sdpa"),
    "nn.TransformerEncoderLayer": _own(lambda how: models.OWN["encoder"](), "sdpa", kind="encoder"),
    "nn.MultiheadAttention": _own(lambda how: models.OWN["multihead"](), "sdpa", kind="encoder"),
    "nn.Transformer": _own(lambda how: EncoderDecoder(), "sdpa", kind="encoder-decoder"),
    "diffusion transformer, one row": _own(lambda how: Joint(1), "sdpa", kind="hybrid"),
    "diffusion transformer, two rows": _own(lambda how: Joint(2), "sdpa", kind="hybrid", gathers=3),
}

ZOO = {**HUGGING_FACE, **OWN}
CASES = [(name, how) for name, entry in ZOO.items() for how in entry.attention]
