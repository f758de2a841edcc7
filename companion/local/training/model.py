"""The base model with its adapter: the forward pass, the loss on what the assistant says, and its gradient.

Llama's architecture (Touvron et al. 2023), as in transformers' `LlamaForCausalLM`, in whose order rows and
names are kept, and PEFT's LoRA on all linear layers. What makes it quick on a processor: examples lie end to
end, without padding; logits are computed only where a token counts in the loss; query, key and value, and
gate and up, are one product each; the frozen weights get no gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .examples import Tokens

DENSE = 384  # tokens: attention over more is computed in blocks, over fewer as whole matrices
LOGITS = 256  # rows of logits at once; a row is the whole vocabulary


@dataclass(frozen=True)
class Config:
    """Sizes of the base model, from its GGUF file."""

    layers: int
    width: int
    hidden: int  # of the feed-forward part
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    rope_base: float
    epsilon: float

    @property
    def head(self) -> int:
        """The width of one attention head."""
        return self.width // self.heads


# The linear layers of a block: their names in PEFT and in GGUF. Those of one group share their input.
GROUPS = (
    (("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v")),
    (("self_attn.o_proj", "attn_output"),),
    (("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up")),
    (("mlp.down_proj", "ffn_down"),),
)


def read_base(file: Path) -> tuple[Config, dict[str, Tensor]]:
    """The sizes and the weights of a GGUF file: float32, its own names, rows in transformers' order."""
    import gguf

    reader = gguf.GGUFReader(file)

    def value(key: str):
        return reader.fields[f"llama.{key}"].contents()

    config = Config(
        layers=value("block_count"),
        width=value("embedding_length"),
        hidden=value("feed_forward_length"),
        heads=value("attention.head_count"),
        kv_heads=value("attention.head_count_kv"),
        vocabulary=value("vocab_size"),
        context=value("context_length"),
        rope_base=value("rope.freq_base"),
        epsilon=value("attention.layer_norm_rms_epsilon"),
    )
    tensors = {}
    for tensor in reader.tensors:
        weights = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weights = interleaved(weights, config.head, back=True)
        tensors[tensor.name] = weights
    return config, tensors


def interleaved(rows: Tensor, head: int, *, back: bool = False) -> Tensor:
    """Rows [heads * head, …] of q or k in llama.cpp's order: a head's halves take turns; or `back`."""
    shape = (head // 2, 2) if back else (2, head // 2)
    return rows.reshape(-1, *shape, rows.shape[-1]).transpose(1, 2).reshape(rows.shape).contiguous()


class Packed:
    """Examples end to end: what a forward pass needs of their places.

    ids: [tokens]. targets: the places whose next token counts; labels, weights: that token and its weight.
    """

    def __init__(self, examples: Sequence[Tokens], config: Config, device: torch.device, dtype) -> None:
        lengths = [len(example) for example in examples]
        ids = torch.cat([torch.from_numpy(example.ids) for example in examples]).long()
        weights = torch.cat([torch.from_numpy(example.weights) for example in examples])
        self.targets = (weights != 0).nonzero()[:, 0] - 1  # an example's first token is never the model's
        self.labels = ids[self.targets + 1].to(device)
        self.weights = weights[self.targets + 1].to(device)
        self.targets, self.ids = self.targets.to(device), ids.to(device)
        places = torch.cat([torch.arange(length) for length in lengths]).float()
        turns = torch.arange(0, config.head, 2) / config.head
        angle = places[:, None] * config.rope_base**-turns
        self.cos, self.sin = (part[:, None].to(device, dtype) for part in (angle.cos(), angle.sin()))
        self.spans = _spans(lengths, device)


@dataclass(frozen=True)
class Span:
    """Examples whose attention is computed together. start, stop: their tokens. longest: of them, in tokens.

    pad: [examples * longest] the place of each in start..stop, and `real`: whether it is one; None where all
    are equally long. unpad: [stop - start] back.
    """

    start: int
    stop: int
    longest: int
    pad: Tensor | None
    real: Tensor | None
    unpad: Tensor | None


def _spans(lengths: Sequence[int], device) -> list[Span]:
    spans, first, start = [], 0, 0
    while first < len(lengths):
        last = first + 1
        while (
            last < len(lengths)
            and max(lengths[first : last + 1]) <= DENSE
            and min(lengths[first : last + 1]) * 1.25 >= max(lengths[first : last + 1])
        ):
            last += 1
        chosen = lengths[first:last]
        longest, total = max(chosen), sum(chosen)
        pad = real = unpad = None
        if min(chosen) < longest:
            begins = torch.tensor([sum(chosen[:number]) for number in range(len(chosen))])
            within, sizes = torch.arange(longest), torch.tensor(chosen)
            real = within[None] < sizes[:, None]
            pad = (begins[:, None] + within.clamp(max=longest)).clamp(max=total - 1).flatten()
            unpad = real.flatten().nonzero()[:, 0].to(device)
            pad, real = pad.to(device), real.flatten()[:, None].to(device)
        spans.append(Span(start, start + total, longest, pad, real, unpad))
        first, start = last, start + total
    return spans


class _Norm(torch.autograd.Function):
    """RMSNorm (Zhang and Sennrich 2019) with frozen gains: sums in float32, as transformers has it."""

    @staticmethod
    def forward(ctx, x, gains, epsilon):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        normed = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, gains)
        return normed * gains

    @staticmethod
    def backward(ctx, gradient):
        normed, scale, gains = ctx.saved_tensors
        wide, gradient = normed.float(), (gradient * gains).float()
        along = (gradient * wide).mean(-1, keepdim=True)
        return torch.addcmul(gradient, wide, along, value=-1).mul_(scale).to(normed.dtype), None, None


class _Linear(torch.autograd.Function):
    """x W^T + x A^T B^T for frozen W [out, in], with A [rank, in] and B [out, rank] in float32."""

    @staticmethod
    def forward(ctx, x, weight, a, b, mask):
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = x @ a.T
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.mask = mask
        return F.linear(x, weight).addmm_(low, b.T)

    @staticmethod
    def backward(ctx, gradient):
        x, low, weight, a, b = ctx.saved_tensors
        low_gradient = gradient @ b
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(low_gradient, a)
        to_b = (gradient.T @ low).float()
        return to_x, None, (low_gradient.T @ x).float(), to_b if ctx.mask is None else to_b * ctx.mask, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020), for [tokens, gate and up side by side]."""

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        to_both = torch.empty_like(both)
        to_gate, to_up = to_both.chunk(2, -1)
        open_ = torch.sigmoid(gate)
        silu = gate * open_
        torch.mul(gradient, silu, out=to_up)
        torch.mul(gradient, up, out=to_gate)
        to_gate.mul_(torch.addcmul(open_, silu, 1 - open_))
        return to_both


class _Attention(torch.autograd.Function):
    """Causal attention with rotary places (Su et al. 2021) and shared keys (Ainslie et al. 2023).

    Whole score matrices, kept for the backward pass: for short examples that is quicker than in blocks.
    Tokens after an example's end are seen by none before it, so padding needs no mask of its own.
    """

    @staticmethod
    def forward(ctx, qkv, packed, span, config):
        query, key, value = _heads(qkv, packed, span, config)
        scores = query @ key.transpose(-1, -2)
        scores += _causal(span.longest, config, qkv)
        shares = scores.softmax(-1)
        ctx.save_for_backward(query, key, value, shares)
        ctx.of = packed, span, config
        return _rows(shares @ value, span, config)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, shares = ctx.saved_tensors
        packed, span, config = ctx.of
        examples, groups = query.shape[0], config.heads // config.kv_heads
        gradient = _padded(gradient, span)
        if span.real is not None:
            gradient = gradient * span.real
        gradient = gradient.reshape(examples, span.longest, config.kv_heads, groups, config.head)
        gradient = gradient.permute(0, 2, 3, 1, 4).reshape(query.shape)
        to_value = shares.transpose(-1, -2) @ gradient
        to_scores = torch._softmax_backward_data(gradient @ value.transpose(-1, -2), shares, -1, shares.dtype)
        to_query = (to_scores @ key).mul_(config.head**-0.5)
        to_key = to_scores.transpose(-1, -2) @ query
        cos, sin = packed.cos[span.start : span.stop], -packed.sin[span.start : span.stop]
        to_query = _turned(_rows(to_query, span, config), cos, sin, config)
        to_key, to_value = (_rows(part, span, config) for part in (to_key, to_value))
        return torch.cat((to_query, _turned(to_key, cos, sin, config), to_value), -1), None, None, None


def _causal(longest: int, config: Config, like: Tensor) -> Tensor:
    """[groups * longest, longest]: minus infinity where a token would look ahead."""
    full = torch.full((longest, longest), -math.inf, dtype=like.dtype, device=like.device)
    return full.triu_(1).repeat(config.heads // config.kv_heads, 1)


def _turned(rows: Tensor, cos: Tensor, sin: Tensor, config: Config) -> Tensor:
    """Rows [tokens, heads * head] turned by their places."""
    low, high = rows.reshape(len(rows), -1, config.head).chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).flatten(1)


def _padded(rows: Tensor, span: Span) -> Tensor:
    return rows if span.pad is None else rows.index_select(0, span.pad)


def _heads(qkv: Tensor, packed: Packed, span: Span, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Query [examples, kv heads, groups * longest, head], scaled; key and value [examples, kv heads, longest,
    head]."""
    cos, sin = packed.cos[span.start : span.stop], packed.sin[span.start : span.stop]
    wide = config.heads * config.head
    query = _turned(qkv[:, :wide], cos, sin, config) * config.head**-0.5
    key, value = qkv[:, wide:].chunk(2, -1)
    key = _turned(key, cos, sin, config)
    groups = config.heads // config.kv_heads
    query = _padded(query, span).reshape(-1, span.longest, config.kv_heads, groups, config.head)
    query = query.permute(0, 2, 3, 1, 4).reshape(-1, config.kv_heads, groups * span.longest, config.head)
    key, value = (
        _padded(part, span)
        .reshape(-1, span.longest, config.kv_heads, config.head)
        .transpose(1, 2)
        .contiguous()
        for part in (key, value)
    )
    return query, key, value


def _rows(heads: Tensor, span: Span, config: Config) -> Tensor:
    """[examples, kv heads, groups * longest, head] back to [tokens, heads * head]."""
    groups = heads.shape[2] // span.longest
    rows = heads.reshape(-1, config.kv_heads, groups, span.longest, config.head).permute(0, 3, 1, 2, 4)
    rows = rows.reshape(-1, config.kv_heads * groups * config.head)
    return rows if span.unpad is None else rows.index_select(0, span.unpad)


def _attend(qkv: Tensor, packed: Packed, config: Config) -> Tensor:
    outputs = []
    for span in packed.spans:
        rows = qkv[span.start : span.stop]
        if span.longest <= DENSE:
            outputs.append(_Attention.apply(rows, packed, span, config))
            continue
        cos, sin = packed.cos[span.start : span.stop], packed.sin[span.start : span.stop]
        query, key, value = rows.split(
            (config.heads * config.head, config.kv_heads * config.head, config.kv_heads * config.head), -1
        )
        query, key = _turned(query, cos, sin, config), _turned(key, cos, sin, config)
        groups = config.heads // config.kv_heads
        query, key, value = (
            part.reshape(len(rows), -1, config.head).transpose(0, 1)[None] for part in (query, key, value)
        )
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        outputs.append(seen[0].transpose(0, 1).reshape(len(rows), -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@dataclass(frozen=True)
class Part:
    """The adapter of one linear layer: its place in the layers' group, and its matrices as views.

    a: [rank, in]; b: [out, rank], of which the layer's own rows and columns.
    """

    layer: int
    names: tuple[str, str]
    a: Tensor
    b: Tensor


class Model:
    """A base model with a LoRA adapter.

    rank, alpha: of the adapter, which adds alpha / rank times its product. dtype: of the base model and of
    all that is computed but sums. `parameters`: the trained values as one float32 tensor; `gradient`: theirs.
    """

    def __init__(
        self,
        file: Path,
        *,
        rank: int = 16,
        alpha: int = 32,
        seed: int = 0,
        device="cpu",
        dtype=torch.bfloat16,
    ) -> None:
        self.config, base = read_base(file)
        self.rank, self.alpha, self.device, self.dtype = rank, alpha, torch.device(device), dtype
        self.embedding = base["token_embd.weight"].to(device, dtype)
        self.norm = base["output_norm.weight"].to(device, dtype)
        self.head = self.embedding
        if "output.weight" in base:
            self.head = base["output.weight"].to(device, dtype)
        self.layers = [
            {
                "norms": [
                    base[f"blk.{layer}.{name}_norm.weight"].to(device, dtype) for name in ("attn", "ffn")
                ],
                "weights": [
                    torch.cat([base[f"blk.{layer}.{name}.weight"] for _, name in group]).to(device, dtype)
                    for group in GROUPS
                ],
            }
            for layer in range(self.config.layers)
        ]
        self._add_adapter([[[len(base[f"blk.0.{n}.weight"]) for _, n in group] for group in GROUPS]][0], seed)

    def _add_adapter(self, outputs: list[list[int]], seed: int) -> None:
        """A drawn as PEFT draws it (Kaiming uniform), B zero: the adapter begins by changing nothing."""
        inputs = [self.layers[0]["weights"][number].shape[1] for number in range(len(GROUPS))]
        sizes = [
            (len(outs) * self.rank * width, sum(outs) * len(outs) * self.rank)
            for outs, width in zip(outputs, inputs, strict=True)
        ]
        total = self.config.layers * sum(a + b for a, b in sizes)
        self.parameters = torch.zeros(total, device=self.device)
        self.gradient = torch.zeros(total, device=self.device)
        self.adapter: list[list[tuple[Tensor, Tensor]]] = []
        self.masks: list[Tensor | None] = []
        for outs in outputs:
            blocks = torch.block_diag(*(torch.ones(out, self.rank) for out in outs)).to(self.device)
            self.masks.append(blocks if len(outs) > 1 else None)
        draw = torch.Generator().manual_seed(seed)
        start = 0

        def leaf(*shape: int) -> Tensor:
            nonlocal start
            stop = start + math.prod(shape)
            values = self.parameters[start:stop].view(shape).requires_grad_()
            values.grad = self.gradient[start:stop].view(shape)
            start = stop
            return values

        for _ in range(self.config.layers):
            layer = []
            for outs, width in zip(outputs, inputs, strict=True):
                a, b = leaf(len(outs) * self.rank, width), leaf(sum(outs), len(outs) * self.rank)
                with torch.no_grad():
                    drawn = torch.rand(a.shape, generator=draw).mul_(2).sub_(1).mul_(width**-0.5)
                    a.copy_(drawn)
                layer.append((a, b))
            self.adapter.append(layer)
        self.outputs = outputs

    def parts(self) -> list[Part]:
        """The adapter, linear layer by linear layer, detached; `b` without the scale alpha / rank."""
        found = []
        for number, layer in enumerate(self.adapter):
            for group, outs, (a, b) in zip(GROUPS, self.outputs, layer, strict=True):
                row = 0
                for place, (names, out) in enumerate(zip(group, outs, strict=True)):
                    columns = slice(place * self.rank, (place + 1) * self.rank)
                    own = b.detach()[row : row + out, columns]
                    found.append(Part(number, names, a.detach()[columns], own))
                    row += out
        return found

    def hidden(self, packed: Packed) -> Tensor:
        """[targets, width]: the last layer's output where a token is to be predicted."""
        scale = self.alpha / self.rank
        x = F.embedding(packed.ids, self.embedding)
        for layer, adapter in zip(self.layers, self.adapter, strict=True):

            def linear(x: Tensor, number: int, layer=layer, adapter=adapter) -> Tensor:
                a, b = adapter[number]
                return _Linear.apply(x, layer["weights"][number], a, b * scale, self.masks[number])

            normed = _Norm.apply(x, layer["norms"][0], self.config.epsilon)
            x = x + linear(_attend(linear(normed, 0), packed, self.config), 1)
            normed = _Norm.apply(x, layer["norms"][1], self.config.epsilon)
            x = x + linear(_SwiGLU.apply(linear(normed, 2)), 3)
        return _Norm.apply(x[packed.targets], self.norm, self.config.epsilon)

    def loss(self, examples: Sequence[Tokens], *, total: float | None = None) -> tuple[float, int]:
        """The cross-entropy (nats, summed with the tokens' weights) and the number of tokens that the model
        would have chosen right.

        total: the sum of weights in the whole batch; where it is given, the gradient of loss / total is added
        to `gradient`.
        """
        packed = Packed(examples, self.config, self.device, self.dtype)
        with torch.set_grad_enabled(total is not None):
            hidden = self.hidden(packed)
        back = torch.empty_like(hidden)
        loss, right = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(hidden), LOGITS):
                rows = slice(start, start + LOGITS)
                labels, weights = packed.labels[rows], packed.weights[rows]
                logits = (hidden[rows] @ self.head.T).float()
                right += int(((logits.argmax(-1) == labels) & (weights > 0)).sum())
                each = F.cross_entropy(logits, labels, reduction="none")
                loss += float((each * weights).sum())
                if total is not None:
                    shares = logits.softmax(-1)
                    shares[torch.arange(len(labels), device=self.device), labels] -= 1
                    shares.mul_((weights / total)[:, None])
                    back[rows] = shares.to(self.dtype) @ self.head
        if total is not None:
            hidden.backward(back)
        return loss, right
