"""A scalar reference model that counts each number read or written and each operation.

It shares no code with the plan: its counts are what a plan must state. Sums start from zero, so
that n terms are n additions; comparisons are not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from onelaunch.config import ModelConfig

Index = tuple[int, ...]


@dataclass
class Tally:
    """What one stage did: distinct numbers by the buffer or weight that they lie in."""

    kind: str
    layer: int
    reads: set[tuple[str, Index]] = field(default_factory=set)
    writes: set[tuple[str, Index]] = field(default_factory=set)
    weights: set[tuple[str, Index]] = field(default_factory=set)
    flops: int = 0

    def count(self, of: str) -> dict[str, int]:
        """Distinct numbers touched in each buffer; `of` is reads, writes or weights."""
        return dict(Counter(name for name, _ in getattr(self, of)))


class ScalarModel:
    def __init__(self, config: ModelConfig, weights: dict[str, list]) -> None:
        self.config, self.model_weights = config, weights
        self.memory: dict[tuple[str, Index], float] = {}
        self.past = 0
        self.tallies: list[Tally] = []

    def forward(self, tokens_BS: list[list[int]], all_positions: bool, sample: bool) -> None:
        """Runs every stage; leaves logits and next in memory, and one tally a stage."""
        self.tallies = []
        self.batch, self.sequence = len(tokens_BS), len(tokens_BS[0])
        for b, s in self.rows():
            self.memory["tokens", (b, s)] = tokens_BS[b][s]
        self.begin("embed", -1)
        for b, s in self.rows():
            token = int(self.read("tokens", b, s))
            for d in range(self.config.dim):
                self.write(self.weight("embed_tokens", token, d), "x", b, s, d)
        for layer in range(self.config.n_layers):
            self.layer(layer)
        self.head(all_positions)
        if sample:
            self.begin("sample", -1)
            last = self.sequence - 1 if all_positions else 0
            for b in range(self.batch):
                logits = [self.read("logits", b, last, v) for v in range(self.config.vocab_size)]
                self.write(logits.index(max(logits)), "next", b)
        self.past += self.sequence

    def layer(self, i: int) -> None:
        c, prefix = self.config, f"layers.{i}."
        self.begin("qkv", i)
        for b, s in self.rows():
            normed = self.normed("x", b, s, f"{prefix}input_layernorm")
            for part, heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads)):
                name = f"{prefix}self_attn.{part}_proj"
                flat = self.linear(normed, name, heads * c.head_dim)
                if c.qkv_bias:
                    flat = [self.did(x + self.bias(name, i)) for i, x in enumerate(flat)]
                for h in range(heads):
                    head = flat[h * c.head_dim : (h + 1) * c.head_dim]
                    if part != "v":
                        if c.qk_norm:
                            head = self.norm(head, f"{prefix}self_attn.{part}_norm")
                        head = self.rotated(head, self.past + s)
                    for e, value in enumerate(head):
                        if part == "q":
                            self.write(value, "q", b, s, h, e)
                        else:
                            place = (int(part == "v"), b, h, self.past + s, e)
                            self.write(value, f"cache.{i}", *place)
        self.begin("attention", i)
        for b, s in self.rows():
            for h in range(c.n_heads):
                for e, value in enumerate(self.attended(i, b, s, h)):
                    self.write(value, "attn_out", b, s, h * c.head_dim + e)
        self.begin("out_proj", i)
        self.project_and_add("attn_out", c.q_dim, f"{prefix}self_attn.o_proj")
        self.begin("gate_up", i)
        for b, s in self.rows():
            normed = self.normed("x", b, s, f"{prefix}post_attention_layernorm")
            gates = self.linear(normed, f"{prefix}mlp.gate_proj", c.hidden_dim)
            ups = self.linear(normed, f"{prefix}mlp.up_proj", c.hidden_dim)
            for f, (gate, up) in enumerate(zip(gates, ups, strict=True)):
                exp = self.did(math.exp(self.did(-gate)))
                silu = self.did(gate / self.did(1 + exp))
                self.write(self.did(silu * up), "hidden", b, s, f)
        self.begin("down", i)
        self.project_and_add("hidden", c.hidden_dim, f"{prefix}mlp.down_proj")

    def head(self, all_positions: bool) -> None:
        c = self.config
        self.begin("head", -1)
        classifier = "embed_tokens" if c.tied_embeddings else "lm_head"
        for b, s in self.rows():
            if all_positions or s == self.sequence - 1:
                logits = self.linear(self.normed("x", b, s, "norm"), classifier, c.vocab_size)
                for v, value in enumerate(logits):
                    self.write(value, "logits", b, s if all_positions else 0, v)

    def attended(self, i: int, b: int, s: int, h: int) -> list[float]:
        E = self.config.head_dim
        group = h // (self.config.n_heads // self.config.n_kv_heads)
        query = [self.read("q", b, s, h, e) for e in range(E)]
        visible = range(self.past + s + 1)
        scores = []
        for t in visible:
            key = [self.read(f"cache.{i}", 0, b, group, t, e) for e in range(E)]
            scores.append(self.did(self.dot(query, key) * E**-0.5))
        best = max(scores)
        exps = [self.did(math.exp(self.did(score - best))) for score in scores]
        total = self.sum(exps)
        weights = [self.did(exp / total) for exp in exps]
        return [
            self.dot(weights, [self.read(f"cache.{i}", 1, b, group, t, e) for t in visible])
            for e in range(E)
        ]

    def rotated(self, head: list[float], position: int) -> list[float]:
        c, E = self.config, len(head)
        out = []
        for e, value in enumerate(head):
            if c.rope_layout == "interleaved":
                pair, other, first = e // 2, e ^ 1, e % 2 == 0
            else:
                pair, other, first = e % (E // 2), (e + E // 2) % E, e < E // 2
            angle = position * c.rope_theta ** (-2 * pair / E)
            sine = -math.sin(angle) if first else math.sin(angle)
            along, across = self.did(value * math.cos(angle)), self.did(head[other] * sine)
            out.append(self.did(along + across))
        return out

    def project_and_add(self, source: str, width: int, weight: str) -> None:
        for b, s in self.rows():
            inputs = [self.read(source, b, s, i) for i in range(width)]
            for d, value in enumerate(self.linear(inputs, weight, self.config.dim)):
                self.write(self.did(self.read("x", b, s, d) + value), "x", b, s, d)

    def normed(self, source: str, b: int, s: int, weight: str) -> list[float]:
        return self.norm([self.read(source, b, s, d) for d in range(self.config.dim)], weight)

    def norm(self, row: list[float], weight: str) -> list[float]:
        mean = self.did(self.sum([self.did(x * x) for x in row]) * (1 / len(row)))
        scale = self.did(self.did(mean + self.config.norm_eps) ** -0.5)
        return [self.did(self.did(x * scale) * self.weight(weight, i)) for i, x in enumerate(row)]

    def linear(self, row: list[float], weight: str, width: int) -> list[float]:
        return [
            self.dot(row, [self.weight(weight, o, i) for i in range(len(row))])
            for o in range(width)
        ]

    def dot(self, some: list[float], others: list[float]) -> float:
        return self.sum([self.did(a * b) for a, b in zip(some, others, strict=True)])

    def sum(self, values: list[float]) -> float:
        self.tallies[-1].flops += len(values)
        return math.fsum(values)

    def did(self, value: float) -> float:
        self.tallies[-1].flops += 1
        return value

    def rows(self) -> list[Index]:
        return [(b, s) for b in range(self.batch) for s in range(self.sequence)]

    def begin(self, kind: str, layer: int) -> None:
        self.tallies.append(Tally(kind, layer))

    def weight(self, name: str, *index: int) -> float:
        self.tallies[-1].weights.add((f"{name}.weight", index))
        value = self.model_weights[f"{name}.weight"]
        for i in index:
            value = value[i]
        return value

    def bias(self, name: str, index: int) -> float:
        self.tallies[-1].weights.add((f"{name}.bias", (index,)))
        return self.model_weights[f"{name}.bias"][index]

    def read(self, buffer: str, *index: int) -> float:
        self.tallies[-1].reads.add((buffer, index))
        return self.memory[buffer, index]

    def write(self, value: float, buffer: str, *index: int) -> None:
        self.tallies[-1].writes.add((buffer, index))
        self.memory[buffer, index] = value
